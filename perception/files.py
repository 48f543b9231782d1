"""Files appear whole or not at all: they are written beside their place and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends well, and goes away when it does not.

    Missing folders are made. Two processes that write the same file do not meet.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | Path, content: object, indent: int | None = 1) -> None:
    """Writes JSON, indented for people unless `indent` is None."""
    separators = (",", ":") if indent is None else None
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=indent, separators=separators) + "\n", encoding="utf-8")
