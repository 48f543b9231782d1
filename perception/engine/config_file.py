"""Finds and reads config files and checks their datasets, without importing heavy modules.

A `.py` config is a program that runs. A `.yaml` or `.json` config with the same keys is only read: the form for configs
that people take from others.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

from perception.errors import ConfigError
from perception.extensions import import_modules
from perception.files import check_dataset
from perception.reading import short

_PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel the configs are inside the package, in a checkout next to it.
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"

DATA_SUFFIXES = (".yaml", ".yml", ".json")


def find_config(name_or_path: str | Path) -> Path:
    """Returns the path of a config file.

    Args:
        name_or_path: a file (.py, .yaml, .yml or .json), or the name of a config of the library, such as
            `synthetic/nano` or `configs/synthetic/nano.py`.

    Raises:
        ConfigError: it is neither.
    """
    if Path(name_or_path).is_file():
        if Path(name_or_path).suffix not in (".py", *DATA_SUFFIXES):
            raise ConfigError(f"config {name_or_path} is neither .py nor .yaml, .yml or .json; give a config file")
        return Path(name_or_path)
    return _shipped(name_or_path, f"config {name_or_path}")


def _shipped(name_or_path: str | Path, where: str) -> Path:
    name = Path(name_or_path).as_posix().removeprefix("configs/").removesuffix(".py")
    shipped = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in SHIPPED.glob("[a-z]*/*.py")}
    if name not in shipped:
        near = [known for known in shipped if known.endswith(f"/{name}")] or difflib.get_close_matches(name, shipped, 1)
        fix = f"did you mean {near[0]}?" if near else f"give a path, or one of {', '.join(sorted(shipped))}"
        raise ConfigError(f"{where} is neither a file nor a config of the library; {fix}")
    return shipped[name]


def read_config(name_or_path: str | Path, options: dict | None = None) -> tuple[Path, Config]:
    """Reads a config file with overrides, and returns its path and its content. `load_config` checks the content.

    Args:
        name_or_path: as for `find_config`.
        options: overrides by dotted key, e.g. `{"train.lr": 1e-3}`.

    Raises:
        ConfigError: there is no such config, it is broken, or an override does not fit.
    """
    path = find_config(name_or_path)
    source = _read_data(path) if path.suffix in DATA_SUFFIXES else _run_program(path)
    for key in options or {}:
        if (section := key.split(".")[0]) in ("model", "train_data", "val_data", "train") and section not in source:
            raise ConfigError(f"--cfg-options {key}: {path} has no {section}; its sections: {', '.join(source)}")
    try:
        source.merge_from_dict(options or {})
    except (TypeError, KeyError, AssertionError, IndexError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--cfg-options {short(options)} does not fit {path} ({reason}); write section.key=value, such as "
            "train.lr=1e-4"
        ) from None
    return path, source


def _run_program(path: Path) -> Config:
    try:
        return Config.fromfile(path, import_custom_modules=False)  # `load_config` imports them
    except Exception as error:  # a config is a Python program and may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{path}: {type(error).__name__}: {reason}; fix the config file") from None


def _read_data(path: Path, above: tuple[Path, ...] = ()) -> Config:
    """Reads a YAML or JSON config. Its `_base_` are configs of the library, which run, or further such files."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}); fix the config file") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path} holds no sections; write `model:`, `val_data:` and so on, with their keys below")
    bases = content.pop("_base_", [])
    source = Config()
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: _base_ is {bases!r}; write the name of a config of the library, or of a file")
        if Path(base).suffix in DATA_SUFFIXES:
            below = path.parent / base
            if below in (*above, path):
                raise ConfigError(f"{path}: _base_ {base} leads back to itself; remove it")
            if not below.is_file():
                raise ConfigError(f"{path}: _base_ {base} is not a file; write a path seen from the config's folder")
            part = _read_data(below, (*above, path))
        else:
            part = _run_program(_shipped(base, f"{path}: _base_ {base}"))
        source.merge_from_dict(part.to_dict())
    try:
        source.merge_from_dict(content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} does not fit its _base_ ({error}); fix the config file") from None
    # Lists instead of the tuples of Python, so that the copy in a work directory can be read in the same way.
    return Config(json.loads(json.dumps(source.to_dict())), filename=str(path))


def parse_options(pairs: list[str]) -> dict:
    """Parses KEY=VALUE pairs of `--cfg-options` for `load_config`. Values that are not Python literals are strings.

    Raises:
        ConfigError: a pair has no `=`, or its key is not names with dots between them.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*=.*", pair, re.DOTALL):
            raise ConfigError(f"--cfg-options {short(pair)} is not KEY=VALUE; write e.g. train.lr=1e-4")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            options[key] = value
    return options


def import_extensions(path: Path, source: Mapping[str, Any]) -> None:
    """Imports the modules that a config names in `custom_imports`, from PYTHONPATH or beside the config.

    Raises:
        ConfigError: the config is a YAML or JSON file, the setting has the wrong form, or a module cannot be imported.
    """
    setting = source.get("custom_imports")
    if setting is None:
        return
    if path.suffix in DATA_SUFFIXES:
        raise ConfigError(
            f"{path}: custom_imports runs code, and a {path.suffix} config is only read; write a .py config, or add "
            "--import MODULE to the command"
        )
    names = setting.get("imports") if isinstance(setting, dict) else None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or setting.keys() - {"imports", "allow_failed_imports"}:
        raise ConfigError(f"{path}: custom_imports is {short(setting)}; write dict(imports=['my_package.networks'])")
    if setting.get("allow_failed_imports"):
        raise ConfigError(f"{path}: custom_imports.allow_failed_imports would hide a missing module; remove it")
    import_modules(names, f"{path}: custom_imports.imports", path.parent)


def check_datasets(name_or_path: str | Path, options: dict | None, sections: Sequence[str]) -> None:
    """Checks that the datasets of a config exist. It imports nothing heavy; call it at the start of a command.

    Args:
        name_or_path, options: as for `read_config`.
        sections: some of "train_data" and "val_data". Missing and malformed sections are not reported here, but by
            `load_config`.

    Raises:
        ConfigError: as in `read_config`.
        DataError: as in `check_dataset`.
    """
    _, source = read_config(name_or_path, options)
    for name in sections:
        section = source.get(name)
        if not isinstance(section, dict) or "type" in section:  # a dataset of another class
            continue
        dataroot, version, make_with = (section.get(key) for key in ("dataroot", "version", "make_with"))
        make_with = {} if make_with is None else make_with
        roots = [dataroot] if isinstance(dataroot, str) else dataroot
        if not isinstance(roots, list | tuple) or not isinstance(version, str) or not isinstance(make_with, dict):
            continue
        if all(isinstance(text, str) for text in (*roots, *make_with.values())):
            check_dataset(roots, version, make_with)
