"""Reads splits: which scenes of a dataset belong to a named split or to a split file.

A split is a name, a file, or a tuple of scene names. A file is a JSON list of scene names (`.json`), or text with one
name a line, where empty lines and lines that start with `#` are ignored. A name is one of `<version>/splits.json` or of
the nuScenes devkit. Training, inference and evaluation all resolve a split with `split_scenes`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeAlias

from perception.errors import DataError
from perception.files import replacing
from perception.reading import short

Split: TypeAlias = str | Path | tuple[str, ...]


def is_split_file(split: Split) -> bool:
    """Returns whether a split is a file: a Path always is, text is if it ends in .json or .txt or contains a folder.

    The text alone decides, so that a file called `val` in the working directory does not change the meaning of `val`.
    """
    if isinstance(split, str):
        return split.endswith((".json", ".txt")) or "/" in split or os.sep in split
    return isinstance(split, Path)


def read_split_file(path: str | Path) -> list[str]:
    """Reads the scene names of a split file, each once, in the file's order.

    Raises:
        DataError: the file is missing, is not of the format, or names nothing.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a ValueError is one of the encoding, or a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"split file {path} cannot be read ({reason}); give a list of scene names") from None
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"split file {path} is not valid JSON ({error}); write a list of scene names") from None
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise DataError(f'split file {path} is not a JSON list of scene names; write ["scene-0001", ...]')
    else:
        lines = [line.strip() for line in text.splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise DataError(f"split file {path} lists no scene; write one name a line")
    return list(dict.fromkeys(names))


def write_split_file(path: str | Path, names: Sequence[str], comment: str) -> None:
    """Writes scene names, one a line, below a comment line that gives their origin."""
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in (f"# {comment}", *names)), encoding="utf-8")


def is_official(split: Split) -> bool:
    """Returns whether a split is one of the names that the nuScenes devkit reserves."""
    from nuscenes.utils.splits import is_predefined_split  # the devkit is slow to import

    return isinstance(split, str) and not is_split_file(split) and bool(is_predefined_split(split))


def split_scenes(split: Split, tables: Path, known: Collection[str]) -> list[str]:
    """Lists the scenes of a split that a dataset contains, in the dataset's order.

    A named split may list scenes that the dataset lacks. A file may not: it is written for one dataset, and a missing
    scene would change the score silently. The official names belong to the official versions, as in the devkit's
    evaluation, which takes `val` for a version that ends in `trainval` only, and ignores a `val` in `splits.json`.

    Args:
        split: a file (see `is_split_file`), a name, or scene names.
        tables: folder of the tables, for its name, its `splits.json` and error messages.
        known: names of all scenes of the tables.

    Raises:
        DataError: the file or `splits.json` is malformed, a scene of the file is unknown, or the split is unknown,
            empty, or an official one of another version.
    """
    if isinstance(split, tuple):
        names = list(split)
    elif is_split_file(split):
        names = read_split_file(split)
        if unknown := [name for name in names if name not in known]:
            raise DataError(
                f"split file {split} lists {len(unknown)} of {len(names)} scenes that {tables / 'scene.json'} lacks, "
                f"such as {short(unknown[0])}; remove them or give the version that they belong to"
            )
    else:
        names = _named_scenes(str(split), tables)
    wanted = set(names)
    found = [name for name in known if name in wanted]
    if not found:
        raise DataError(
            f"{tables / 'scene.json'} holds no scene of split {short(str(split))}: give another split or version"
        )
    return found


def _named_scenes(split: str, tables: Path) -> list[str]:
    """Returns the scene names of an official split or of one in `splits.json`."""
    from nuscenes.utils.splits import create_splits_scenes

    official: dict[str, list[str]] = create_splits_scenes()
    versions = {
        name: "mini" if name.startswith("mini") else "test" if name == "test" else "trainval" for name in official
    }
    path = tables / "splits.json"
    if split in official:
        if not tables.name.endswith(versions[split]):
            raise DataError(
                f"split {split} is an official one, which the devkit only accepts for a version ending in "
                f"{versions[split]}, not for {tables.name}; list your scenes under another name in {path}"
            )
        return official[split]
    custom = custom_splits(path)
    if split not in custom:
        usable = sorted(custom.keys() | {name for name, end in versions.items() if tables.name.endswith(end)})
        raise DataError(f"{path} has no split {short(split)}; known are {', '.join(map(short, usable))}")
    return custom[split]


def custom_splits(path: Path) -> dict[str, list[str]]:
    """Reads `splits.json`: scene names by split; empty if there is no such file.

    Raises:
        DataError: it cannot be read or is malformed.
    """
    try:
        custom = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from None
    lists = custom.values() if isinstance(custom, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise DataError(f'{path} is not an object with a list of scene names per split; write {{"my_val": ["scene"]}}')
    return custom
