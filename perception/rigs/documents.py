"""Reads calibration files and their fields, with errors that name the file, the field and the fix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.reading import nearest, short


def read_text(path: str | Path, what: str) -> str:
    """Reads a text file.

    Raises:
        DataError: it does not exist, cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}); give {what}") from None


def read_document(path: str | Path, what: str) -> Any:
    """Reads a YAML or JSON file; every suffix but `.json` is YAML.

    A key that stands twice is refused, because the parsers would drop the first one without a word. The header of
    OpenCV's YAML files is skipped.

    Args:
        path: the file.
        what: which file is expected, for messages.

    Raises:
        DataError: the file does not exist or is malformed.
    """
    if Path(path).suffix == ".json":
        try:
            return json.loads(read_text(path, what), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON ({error}); give {what}") from None
    documents = read_documents(path, what)
    if len(documents) > 1:
        raise DataError(f"{path} has {len(documents)} documents; give one ({what})")
    return documents[0] if documents else None


def read_documents(path: str | Path, what: str) -> list[Any]:
    """Reads a YAML file of any number of documents, as `ros2 topic echo` writes them; empty ones are dropped.

    Raises:
        DataError: the file does not exist or is malformed.
    """
    import yaml  # here, so that a vehicle with a JSON file does not need it

    text = read_text(path, what)
    if text.startswith("%YAML:"):
        text = text.partition("\n")[2]
    try:
        return [document for document in yaml.load_all(text, _yaml_loader()) if document is not None]
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not YAML ({' '.join(str(error).split())}); give {what}") from None


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _yaml_loader() -> Any:
    import yaml

    # YAML without duplicate keys, and with numbers such as 1e-3, which YAML 1.1 takes for text.
    loader: Any = type("Loader", (yaml.SafeLoader,), {})

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # which may replace merged ones
        _unique((loader.construct_object(key, deep=True), None) for key in own)
        loader.flatten_mapping(node)
        return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}

    for tag in ("map", "opencv-matrix"):
        loader.add_constructor(f"tag:yaml.org,2002:{tag}", mapping)
    loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return loader


class Fields:
    """A mapping of a document, with the place it stands in.

    Args:
        where: names the file and the section, for messages.
        values: the mapping.

    Raises:
        DataError: `values` is not a mapping with text keys.
    """

    def __init__(self, where: str, values: object) -> None:
        if not isinstance(values, Mapping):
            raise DataError(f"{where} is {short(values)}; give keys and values")
        if odd := [key for key in values if not isinstance(key, str)]:
            raise DataError(f"{where} has the key {odd[0]!r}, which is no text; write it in quotes")
        self.where, self.values = where, values

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def at(self, key: str) -> str:
        """Names a field, for messages."""
        return f"{self.where}: {key}"

    def only(self, *known: str) -> None:
        """Refuses every key but these, and names the nearest one."""
        for key in self.values:
            if key not in known:
                raise DataError(f"{self.where} has the unknown key {key!r}; {nearest(key, known)}")

    def get(self, key: str) -> Any:
        """The value of a key that must be there."""
        if key not in self.values:
            raise DataError(f"{self.where} has no {key}; {nearest(key, list(self.values), found=True)}")
        return self.values[key]

    def section(self, key: str) -> Fields:
        """The mapping at a key."""
        return Fields(self.at(key), self.get(key))

    def text(self, key: str, choices: Iterable[str] = ()) -> str:
        """A text, one of `choices` if there are any."""
        value = self.get(key)
        if not isinstance(value, str) or (choices and value not in choices):
            wanted = nearest(str(value), list(choices)) if choices else "give text"
            raise DataError(f"{self.at(key)} is {short(value)}; {wanted}")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        return float(self.array(key, ()))

    def pixels(self, key: str) -> int:
        """A number of pixels: whole and above 0."""
        value = self.number(key)
        if value != int(value) or value <= 0:
            raise DataError(f"{self.at(key)} is {value:g}; give a whole number of pixels above 0")
        return int(value)

    def array(self, key: str, shape: tuple[int, ...] | None, fix: str = "") -> NDArray[np.float64]:
        """Finite numbers of a shape, or of any length [K] if the shape is None."""
        value = self.get(key)
        try:
            array = np.asarray(value)
        except ValueError:  # rows of different lengths
            array = np.asarray(None)
        fits = array.ndim == 1 if shape is None else array.shape == shape
        if array.dtype.kind not in "fiu" or not fits or not np.isfinite(array).all():
            wanted = "a list of numbers" if shape is None else " x ".join(map(str, shape)) + " numbers"
            raise DataError(f"{self.at(key)} is {short(value)}; give {fix or (wanted if shape != () else 'a number')}")
        return array.astype(np.float64)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts a place in front of the message of a DataError, unless it begins with it."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
