"""Reads pickles that hold plain data, without running any code of theirs.

A pickle is a program: it names functions and calls them. This reader knows a fixed list of names (containers, and
what numpy's arrays, scalars and dtypes are pickled with) and replaces numpy's functions by its own, which check sizes
and types before they touch memory. Every other name is refused before it is imported.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

_LAST_CHARACTER = 0x10FFFF
_KINDS = "biufcSU"  # of dtypes: bool, numbers, text; an array of objects could hold anything


class _DType:
    """A dtype while it is unpickled. numpy's own could be given sizes and flags that do not fit its type."""

    __slots__ = ("dtype",)

    def __init__(self, name: str, align: object = False, copy: object = True) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[a-zA-Z]\d{0,6}", name):
            raise pickle.UnpicklingError(f"dtype {name!r} is not that of plain numbers or text")
        dtype = np.dtype(name)
        if dtype.kind not in _KINDS:
            raise pickle.UnpicklingError(f"dtype {name!r} is not that of plain numbers or text")
        self.dtype = dtype

    def __setstate__(self, state: tuple) -> None:
        # version, byte order, subdtype, names, fields, item size, alignment, flags
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            raise pickle.UnpicklingError("a dtype with fields is not plain data")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _elements(data: object, dtype: object, shape: object, order: object = "C") -> np.ndarray:
    """Returns the array of a buffer after checking that it fits type and shape."""
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array without bytes or without dtype is not plain data")
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 32:
        raise pickle.UnpicklingError("the shape of an array is not one of whole numbers")
    if prod(shape) * dtype.dtype.itemsize != len(data) or dtype.dtype.itemsize == 0:
        raise pickle.UnpicklingError(f"an array of shape {shape} and {dtype.dtype} does not have {len(data)} bytes")
    characters = np.dtype(f"{dtype.dtype.byteorder}u4")
    if dtype.dtype.kind == "U" and (np.frombuffer(data, characters) > _LAST_CHARACTER).any():
        raise pickle.UnpicklingError("an array of text holds numbers that are no characters")
    return np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


class _Array(np.ndarray):
    """An array while it is unpickled; a numpy array like any other afterwards."""

    def __setstate__(self, state: tuple) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("the state of an array is malformed")
        _, shape, dtype, fortran, data = state
        _elements(data, dtype, shape)
        super().__setstate__((1, shape, dtype.dtype, bool(fortran), bytes(data)))


def _empty(*arguments: object) -> np.ndarray:
    return np.zeros(0).view(_Array)  # its state follows


def _scalar(dtype: object, data: object) -> object:
    return _elements(data, dtype, (1,))[0]


def _bytearray(data: object = b"", codec: object = "latin-1") -> bytearray:
    if not isinstance(data, bytes | str) or codec != "latin-1":
        raise pickle.UnpicklingError("a bytearray of something else than bytes is not plain data")
    return bytearray(data, "latin-1") if isinstance(data, str) else bytearray(data)


def _encode(text: object, codec: object) -> bytes:
    """Bytes in pickles of protocol 2."""
    if not isinstance(text, str) or codec != "latin1":
        raise pickle.UnpicklingError(f"bytes in the codec {codec!r} are not plain data")
    return text.encode("latin1")


class _Name:
    """A callable that a pickle may name. It has no attributes that a pickle could change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function has no state")


def _numpy(name: str) -> tuple[tuple[str, str], ...]:
    """A name of numpy's inner modules, before and since numpy 2."""
    module, _, function = name.rpartition(".")
    return (f"numpy.core.{module}", function), (f"numpy._core.{module}", function)


_NAMES: dict[tuple[str, str], Callable[..., object]] = {
    **dict.fromkeys((("builtins", "set"), ("__builtin__", "set")), set),
    **dict.fromkeys((("builtins", "frozenset"), ("__builtin__", "frozenset")), frozenset),
    **dict.fromkeys((("builtins", "complex"), ("__builtin__", "complex")), complex),
    **dict.fromkeys((("builtins", "bytes"), ("__builtin__", "bytes")), lambda: b""),  # how protocol 2 writes it
    **dict.fromkeys((("builtins", "bytearray"), ("__builtin__", "bytearray")), _bytearray),
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _empty,
    **dict.fromkeys(_numpy("multiarray._reconstruct"), _empty),
    **dict.fromkeys(_numpy("multiarray.scalar"), _scalar),
    **dict.fromkeys(_numpy("numeric._frombuffer"), _elements),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (call := _NAMES.get((module, name))) is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain data and numpy arrays are read")
        return _Name(call)


# Opcodes without an argument, but for those that make instances of classes.
_BARE = rb"[()012NR\]abdelstu}\x85-\x89\x8f-\x91\x93\x94]"
_LENGTHS = {
    b"U": "<B", b"\x8a": "<B", b"\x8c": "<B", b"C": "<B", b"T": "<i", b"\x8b": "<i", b"X": "<I", b"B": "<I",
    b"\x8d": "<Q", b"\x8e": "<Q", b"\x96": "<Q",
}  # fmt: skip


def _check_opcodes(data: bytes) -> None:
    """Checks that a pickle has no opcode but those of plain data, and no number that makes pickle allocate too much.

    pickle allocates a table as long as the largest index of a memo entry, and strings before it reads them.

    Raises:
        pickle.UnpicklingError: it has, or it is truncated.
    """
    highest = min(len(data) // 6 >> 24, 255)  # byte of an index; an object with an entry takes 6 bytes or more
    run = re.compile(
        rb"(?:%b+|[KMJGhqjr\x80\x95c](?:(?<=[Khq\x80]).|(?<=M)..|(?<=[Jj]).{4}|(?<=r)...[\x00-%b]|(?<=[G\x95]).{8}|"
        rb"(?<=c)[^\n]{1,99}\n[^\n]{1,99}\n)){1,4000}" % (_BARE, re.escape(bytes([highest]))),
        re.DOTALL,
    )
    position = 0
    while opcode := data[position : position + 1]:
        if opcode == b".":
            return
        if opcode in _LENGTHS:
            width = struct.calcsize(_LENGTHS[opcode])
            if position + 1 + width > len(data):
                break
            (length,) = struct.unpack_from(_LENGTHS[opcode], data, position + 1)
            position += 1 + width + length
            if length < 0 or position > len(data):
                break
        elif found := run.match(data, position):
            position = found.end()
        else:
            raise pickle.UnpicklingError(f"byte {position} is not an opcode of plain data")
    raise pickle.UnpicklingError("it is truncated")


def read_plain_pickle(data: bytes) -> Any:
    """Reads containers, numbers, text, bytes and numpy arrays, scalars from a pickle of protocol 2 or later.

    Nothing that the pickle names is imported or called.

    Raises:
        ValueError: the data is no such pickle; the message says why.
    """
    try:
        _check_opcodes(data)
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(reason[0]) from None
