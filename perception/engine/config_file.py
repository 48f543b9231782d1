"""Finds and reads config files, and names the datasets that are missing, before anything heavy is loaded."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from perception.errors import ConfigError
from perception.files import check_dataset

_PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel the configs lie in the package, in a checkout beside it.
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def find_config(name_or_path: str | Path) -> Path:
    """The file of a config.

    Args:
        name_or_path: a file, or the name of a config that came with the library, such as `synthetic/nano` or
            `configs/synthetic/nano.py`.

    Raises:
        ConfigError: it is neither.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    name = Path(name_or_path).as_posix().removeprefix("configs/").removesuffix(".py")
    shipped = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in SHIPPED.glob("[a-z]*/*.py")}
    if name not in shipped:
        near = [known for known in shipped if known.endswith(f"/{name}")] or difflib.get_close_matches(name, shipped, 1)
        fix = f"did you mean {near[0]}?" if near else f"give a path, or one of {', '.join(sorted(shipped))}"
        raise ConfigError(f"config {name_or_path} is neither a file nor a config of the library; {fix}")
    return shipped[name]


def read_config(name_or_path: str | Path, options: dict | None = None) -> tuple[Path, Config]:
    """The file of a config, and its content with overrides, not yet checked.

    Args:
        name_or_path: as of `find_config`.
        options: overrides with dotted keys, e.g. `{"train.lr": 1e-3}`.

    Raises:
        ConfigError: there is no such config, it is broken, or an override does not fit it.
    """
    path = find_config(name_or_path)
    try:
        source = Config.fromfile(path)
    except Exception as error:  # the file is a program: anything can go wrong in it
        raise ConfigError(
            f"{path}: {type(error).__name__}: {str(error).splitlines()[0]}; fix the config file"
        ) from None
    for key in options or {}:
        if (section := key.split(".")[0]) in ("model", "train_data", "val_data", "train") and section not in source:
            raise ConfigError(f"--cfg-options {key}: {path} has no {section}; its sections: {', '.join(source)}")
    try:
        source.merge_from_dict(options or {})
    except (TypeError, KeyError, AssertionError, IndexError) as error:
        raise ConfigError(
            f"--cfg-options {options} does not fit {path} ({error}); write section.key=value, e.g. train.lr=1e-4"
        ) from None
    return path, source


def parse_options(pairs: list[str]) -> dict:
    """`--cfg-options` KEY=VALUE pairs as a dict for `load_config`; values are Python literals, anything else is text.

    Raises:
        ConfigError: a pair has no `=`.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ConfigError(f"--cfg-options {pair!r} is not KEY=VALUE; write e.g. train.lr=1e-4")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def check_datasets(name_or_path: str | Path, options: dict | None, sections: Sequence[str]) -> None:
    """Checks that the datasets of some sections of a config exist; loads nothing heavy, so commands begin with it.

    Args:
        name_or_path, options: as of `read_config`.
        sections: of "train_data" and "val_data". What is not there or malformed is left to `load_config`.

    Raises:
        ConfigError: as `read_config`.
        DataError: as `check_dataset`.
    """
    _, source = read_config(name_or_path, options)
    for name in sections:
        section = source.get(name)
        if not isinstance(section, dict):
            continue
        dataroot, version, make_with = (section.get(key, "") for key in ("dataroot", "version", "make_with"))
        roots = [dataroot] if isinstance(dataroot, str) else dataroot
        if isinstance(roots, list | tuple) and all(isinstance(text, str) for text in (*roots, version, make_with)):
            check_dataset(roots, version, make_with)
