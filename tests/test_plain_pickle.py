"""Pickles of plain data are read as pickle reads them; nothing that a pickle names is imported or called."""

import collections
import os
import pickle
import struct
import sys

import numpy as np
import pytest

from perception.data.plain_pickle import read_plain_pickle

PLAIN = {
    "containers": [[1, 2], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {"a": {"b": None}}, {1, 2}, frozenset([3])],
    "numbers": [0, -3, 255, 256, 65536, -(1 << 40), 1 << 300, 2.5, float("inf"), 1j, True, False, None],
    "text": ["", "x" * 300, "é", b"", b"abc", b"\xff" * 300, bytearray(b"q")],
    "ordered": collections.OrderedDict(x=1),
    "many": [[float(k)] for k in range(500)],  # more than 256 entries of the memo
}
ARRAYS = [
    np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">i4"),
    np.zeros((0, 3)), np.array(["ab", "c"]), np.array(7.0), np.ones(4, dtype=bool), np.arange(4, dtype=np.float16),
]  # fmt: skip
SCALARS = [np.int64(3), np.bool_(True), np.float32(2.5), np.str_("ab")]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_data_is_read_as_pickle_reads_it(protocol):
    assert read_plain_pickle(pickle.dumps(PLAIN, protocol)) == PLAIN
    data = pickle.dumps([*ARRAYS, *SCALARS], protocol)
    for found, want in zip(read_plain_pickle(data), pickle.loads(data), strict=True):
        np.testing.assert_array_equal(found, want, strict=True)
        assert type(want) is np.ndarray or type(found) is type(want)


class Calls:
    """Is pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def global_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return b"\x80\x02" + global_of(module, name) + b"(" + b"".join(arguments) + b"tR."


def canaries(path):
    """Pickles that create a file when pickle loads them, and others that only pickle itself must not load."""
    command = f"touch {path}"
    code = f"open({str(path)!r}, 'w').close()"
    yield "system", pickle.dumps(Calls(os.system, command), 2)
    yield "eval", pickle.dumps({"data_list": [Calls(eval, code)]}, 4)
    yield "open", pickle.dumps(Calls(open, str(path), "w"), 5)
    yield "runstring of numpy", call("numpy.testing._private.utils", "runstring", text(code), b"}")
    yield "runstring, short name", call("numpy.testing", "runstring", text(code), b"}")
    yield "through an attribute", b"\x80\x04\x8c\x05numpy\x8c\x0fos.path.os.system\x93" + text(command) + b"\x85R."
    yield "exec_command of numpy", call("numpy.distutils.exec_command", "exec_command", text(command))
    yield "load of numpy", call("numpy", "load", text(str(path)), b"N", b"\x88")
    yield "memmap of numpy", call("numpy", "memmap", text(str(path)), text("u1"), text("w+"), b"K\x00", b"K\x01\x85")
    yield "fromfile", call("numpy.core.multiarray", "fromfile", text(str(path)))
    yield "getattr", call("builtins", "getattr", global_of("numpy", "ndarray"), text("tofile"))
    yield "INST", b"\x80\x02(" + text(command) + b"ios\nsystem\n."
    yield "OBJ", b"\x80\x02(cos\nsystem\n" + text(command) + b"o."
    yield "NEWOBJ", b"\x80\x02csubprocess\nPopen\n(" + text(command) + b"t\x81."
    yield "NEWOBJ of a known name", b"\x80\x02cnumpy\ndtype\n(" + text("O") + b"t\x81."
    yield "persistent", b"\x80\x02Pos.system\n."
    yield "extension", b"\x80\x02\x82\x01."
    yield (
        "BUILD of a name",
        b"\x80\x02" + global_of("numpy.core.multiarray", "scalar") + b"}" + text("_call") + (text("x") + b"sb."),
    )
    yield "BUILD of slots of a name", b"\x80\x02" + global_of("numpy", "dtype") + b"N}" + text("__init__") + b"Ns\x86b."
    yield "array of objects", pickle.dumps(np.array([{}, None], dtype=object), 4)
    yield "dtype with fields", pickle.dumps(np.zeros(2, dtype=[("a", "f4"), ("b", "O")]), 4)
    yield (
        "object of an address",
        call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("O8"))[2:-1], b"C\x08" + b"\x41" * 8),
    )
    # A state that makes the items of a type longer than it is would read memory beyond the buffer.
    array = pickle.dumps(np.zeros(2, dtype="f4"), 2)
    yield "wrong size", array.replace(b"K\x02\x85", b"M\xff\x7f\x85")
    yield "negative size", array.replace(b"K\x02\x85", b"J\xff\xff\xff\xff\x85")
    yield "wrong state", array.replace(text("f4"), text("V4"))
    yield "endless memo", b"\x80\x02]r\xff\xff\xff\x7f."
    yield "endless bytes", b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b"."
    yield "endless bytearray", call("builtins", "bytearray", b"J\xff\xff\xff\x7f")
    yield "endless text", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"."
    yield "truncated", pickle.dumps(PLAIN, 4)[:-30]
    yield "empty", b""
    yield "protocol 0", pickle.dumps([1], 0)


def test_nothing_in_a_pickle_runs(tmp_path):
    path = tmp_path / "canary"
    before = set(sys.modules)
    for name, data in canaries(path):
        with pytest.raises(ValueError) as caught:
            read_plain_pickle(data)
        assert str(caught.value) and "\n" not in str(caught.value), name
        assert not path.exists(), name
    assert not {"numpy.distutils.exec_command", "numpy.testing._private.utils"} & (set(sys.modules) - before)
    pickle.loads(next(canaries(path))[1])  # a canary that pickle itself lets sing
    assert path.exists()


def test_names_cannot_be_changed_for_the_next_pickle(tmp_path):
    for name, data in canaries(tmp_path / "canary"):
        if name.startswith("BUILD"):
            with pytest.raises(ValueError):
                read_plain_pickle(data)
    assert read_plain_pickle(pickle.dumps(np.int64(3), 4)) == 3
