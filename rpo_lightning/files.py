"""Files that matter are written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Weights in whatever number of pieces, and what loading a policy or its tokenizer looks for besides.
_OF_A_POLICY = re.compile(
    r"(adapter_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|generation_config|chat_template)\.json"
    r"|chat_template\.jinja|tokenizer\.model|spiece\.model|vocab\.txt|merges\.txt"
)


def write_parquet(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), partial)


def write_json_lines(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as a JSON Lines file."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path to write to that takes the place of ``path`` once the block has ended well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


@contextmanager
def writing_policy(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write a policy into, whose files go to ``folder`` once the block has ended well.

    A new folder appears whole. In one that exists, files of the same name are replaced one by one (but not a model
    card), weights and tokenizer files of an earlier policy that the new one does not have are removed, and everything
    else stays.
    """
    folder = Path(folder).resolve()
    is_new = not folder.exists()
    # On the file system of the folder, which may be mounted.
    partial = folder.with_name(folder.name + ".partial") if is_new else folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if is_new:
        partial.replace(folder)
        return
    written = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
    for name in written:
        if name == Path("README.md") and (folder / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(folder / name)
    for path in folder.iterdir():
        if _OF_A_POLICY.fullmatch(path.name) and Path(path.name) not in written:
            path.unlink()
    shutil.rmtree(partial)
