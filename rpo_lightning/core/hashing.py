"""One hash of texts, the same in every process, release and run: names of questions, seeds, fingerprints."""

from __future__ import annotations

import hashlib


def stable_hash(text: str) -> int:
    """64 bits that depend on the text alone (Python's own ``hash`` changes from process to process)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def short_name(text: str) -> str:
    """The same as 16 hexadecimal digits."""
    return f"{stable_hash(text):016x}"
