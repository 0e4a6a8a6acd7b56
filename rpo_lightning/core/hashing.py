"""A hash of texts that is the same in every process and release.

Question ids, seeds of questions and fingerprints use it. Saved caches hold its values, so do not change it.
"""

from __future__ import annotations

import hashlib


def stable_hash(text: str) -> int:
    """Hash a text to 64 bits. Python's own ``hash`` differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def short_name(text: str) -> str:
    """Hash a text to 16 hexadecimal digits."""
    return f"{stable_hash(text):016x}"
