"""Checks values of files that others wrote, and formats them for error messages."""

from __future__ import annotations

import json
import math
import reprlib
from numbers import Real
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
