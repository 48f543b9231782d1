"""Files appear whole or not at all: they are written beside their place and renamed. Checks of places and datasets."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from perception.commands import as_called
from perception.errors import ConfigError, DataError


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


def check_place(option: str, path: str | Path, *, folder: bool = False) -> None:
    """Checks that a file, or files in a folder, can be written, and leaves nothing behind; ask before long work.

    Args:
        option: what the place was given as, for messages.
        path: of the file or folder, which need not exist.
        folder: whether it is one.

    Raises:
        ConfigError: there is a folder where a file is wanted or the other way round, or nothing can be written there.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        found, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
        raise ConfigError(f"{option} {path} is {found}; give {wanted}")
    place = path if folder else path.parent
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):  # permissions alone tell root nothing
            pass
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written ({error}); give another place") from None


def check_dataset(dataroot: str | Path | Sequence[str | Path], version: str, make_with: str = "") -> None:
    """Checks that the folders of tables of a dataset exist.

    Args:
        dataroot: root of the dataset, or several.
        version: name of the folder of tables.
        make_with: the command that makes the dataset, as `perception simulate ...`; may be empty.

    Raises:
        DataError: one does not exist; the message holds the command, as the user calls it.
    """
    fix = f"make it with: {as_called(make_with)}" if make_with else "give the root and the version folder of a dataset"
    for root in (dataroot,) if isinstance(dataroot, str | Path) else dataroot:
        if not Path(root, version).is_dir():
            raise DataError(f"dataset {Path(root, version)} does not exist; {fix}")
