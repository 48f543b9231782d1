"""Checks values of files that others wrote, and formats them for error messages."""

from __future__ import annotations

import difflib
import json
import math
import reprlib
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from perception.errors import DataError

_PLAIN = (str, bytes, bool, int, float, list, tuple, dict, np.number, np.bool_)


def typed(value: object, kind: type, where: str, wanted: str) -> Any:
    """Returns a value of a type.

    Args:
        value: from a file.
        kind: the type.
        where: the file and the field, for the message.
        wanted: what the field has to be, for the message.

    Raises:
        DataError: it has another type.
    """
    if not isinstance(value, kind):
        raise DataError(f"{where} is {short(value)}; it must be {wanted}")
    return value


def number(value: object) -> float:
    """Converts a number to float. Anything else, and an integer beyond the range of floats, becomes infinite."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return math.inf


def numbers(value: object, where: str, count: int, *, more: int = 0, allow_nan: bool = False) -> list[float]:
    """Reads a list or array of numbers.

    Args:
        value: from a file.
        where: the file and the field, for the message.
        count: how many there have to be.
        more: how many more there may be.
        allow_nan: whether NaN is a value, for unknown.

    Raises:
        DataError: it is no such list, or a number is not finite.
    """
    found: list[float] = []
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1):
        if count <= len(value) <= count + more:
            found = [number(item) for item in value]
    if not found or not all(np.isfinite(x) or (allow_nan and np.isnan(x)) for x in found):
        raise DataError(f"{where} is {short(value)}; give {count} finite numbers")
    return found


def read_bytes(path: Path, kind: str) -> bytes:
    """Reads a file.

    Args:
        path: the file.
        kind: what it has to be, for the message.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing: give the path of {kind}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give the path of {kind}") from None


def parse_json(path: Path, data: bytes, kind: str) -> Any:
    """Parses the content of a JSON file; arguments as for `read_bytes`.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): give {kind}") from None


def short(value: object) -> str:
    """Formats a value for an error message, as JSON where it is JSON, in one line of at most 60 characters."""
    if value is None:
        return "null or missing"
    if not isinstance(value, _PLAIN):
        return f"of type {type(value).__name__}"
    try:
        text = json.dumps(value)
    except Exception:  # not JSON, or an integer with too many digits, or nested too deeply
        try:
            text = reprlib.repr(value)
        except Exception:
            return f"of type {type(value).__name__}"
    text = " ".join(text[:200].split())
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(key: str, known: Iterable[str], found: bool = False) -> str:
    """The fix for a wrong name: the most similar right one, or all of them.

    Args:
        key: the wrong name.
        known: the right ones, or with `found` those that are there instead.
        found: a key is missing, and `known` are the others.
    """
    known = list(known)
    close = difflib.get_close_matches(key, known, 1)
    if found:
        return f"it has {', '.join(known) or 'nothing'}" + (f" (did you mean {key} by {close[0]}?)" if close else "")
    return f"did you mean {close[0]}?" if close else f"give one of {', '.join(known)}"
