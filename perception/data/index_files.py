"""Stores arrays in one file, which processes map and share, under a name that is a hash of all inputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from perception.errors import PerceptionWarning
from perception.files import replacing
from perception.processes import processors

MAGIC = b"perception index"
HEADER = struct.Struct("<16sII40x")  # magic bytes, checksum of what follows, length of the JSON that follows
ALIGNED = 64  # bytes: the start of each array
KEPT_HASH = 1 << 24  # bytes of a file whose hash is kept
SETTLED_NS = 2_000_000_000  # since the last change of such a file


def content_hash(facts: object, files: Sequence[Path], cache: Path) -> str:
    """Returns a hash of facts, which JSON can hold, and of the bytes of files; `cache` keeps the hashes of large files.

    Threads read large files at the same time.
    """
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=20)
    with ThreadPoolExecutor(processors()) as pool:
        largest_first = sorted(files, key=lambda path: -path.stat().st_size)
        hashes = dict(zip(largest_first, pool.map(partial(_file_hash, cache=cache), largest_first), strict=True))
    for path in files:
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        digest.update(hashes[path])
    return digest.hexdigest()


def _file_hash(path: Path, cache: Path) -> bytes:
    """Returns a hash of a file. That of a large one is kept, because reading gigabytes takes long.

    It is read again if the file's size, times or place on the disk have changed. The time of the last change is set by
    the system alone; a file that has changed just now is not kept, because clocks of file systems are coarse.
    """
    state = path.stat()
    facts = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
    name = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=20).hexdigest()
    kept = cache / f"hash-{name}.json"
    if state.st_size >= KEPT_HASH:
        try:
            found = json.loads(kept.read_bytes())
            if found["facts"] == facts:
                return bytes.fromhex(found["hash"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
    now = time.time_ns()
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if state.st_size >= KEPT_HASH and now - max(state.st_mtime_ns, state.st_ctime_ns) > SETTLED_NS:
        with contextlib.suppress(OSError), replacing(kept) as temporary:  # writing the index will warn
            temporary.write_text(json.dumps({"facts": facts, "hash": digest.hexdigest()}))
    return digest.digest()


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Stores arrays: magic bytes, checksum and length of the header, the header, and the arrays as they are.

    Warns:
        PerceptionWarning: the folder cannot be written, so nothing is stored.
    """
    places, end = {}, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.str, array.shape, end]
        end += -(-array.nbytes // ALIGNED) * ALIGNED
    header = json.dumps(places).encode()
    header += b" " * (-(len(header) + HEADER.size) % ALIGNED)
    checksum = zlib.crc32(header)
    for array in arrays.values():
        checksum = zlib.crc32(_padded(array), checksum)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(HEADER.pack(MAGIC, checksum, len(header)) + header)
            for array in arrays.values():
                file.write(_padded(array))
    except OSError as error:
        warnings.warn(
            f"the index cache {path.parent} cannot be written ({error.strerror}), so the tables are read again next "
            "time; give a folder that can be written as cache_dir or in the environment variable PERCEPTION_CACHE",
            PerceptionWarning,
            stacklevel=3,
        )


def _padded(array: np.ndarray) -> bytes:
    return array.tobytes() + bytes(-array.nbytes % ALIGNED)


def read(path: Path, names: set[str]) -> dict[str, np.ndarray] | None:
    """Maps stored arrays into memory, which processes share; None if there are none, or with a warning if damaged.

    Args:
        path: the file.
        names: those of all its arrays.
    """
    try:
        content = np.memmap(path, dtype=np.uint8, mode="c")  # tensors of its arrays may be written, the file is not
        magic, checksum, length = HEADER.unpack(content[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise ValueError("it is no index")
        if zlib.crc32(content.data[HEADER.size :]) != checksum:
            raise ValueError("its checksum is wrong")
        start = HEADER.size + length
        arrays = {}
        for name, (dtype, shape, place) in json.loads(bytes(content[HEADER.size : start])).items():
            size = np.dtype(dtype).itemsize * int(np.prod(shape))
            arrays[name] = np.asarray(content[start + place :][:size]).view(dtype).reshape(shape)
        if set(arrays) != names:
            raise ValueError("it holds other arrays")
        return arrays
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # damaged files fail in many ways
        warnings.warn(
            f"the index cache {path} cannot be read ({type(error).__name__}: {error}); it is made again",
            PerceptionWarning,
            stacklevel=3,
        )
        return None
