"""Reads the JSON files of the tables of a nuScenes-format dataset, a block of records at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from perception.errors import DataError
from perception.rigs.rig import RIG_FILE, Rig

TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose",
    "log", "scene", "sample", "sample_data", "sample_annotation", "map",
)  # fmt: skip

BLOCK = 1 << 20  # bytes of text that are read at a time; records of a block stay in the processor's cache
LONGEST_RECORD = 1 << 26  # bytes

_OPENING = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[")
_BETWEEN = (b"},", b"}\n,", b"} ,", b"}\r\n,")
_NEXT = re.compile(rb"\}(?:\r?\n| )?,")  # the first of them
TAIL = 1 << 14  # bytes at the end of a block that nearly always hold one of them
_SEPARATOR = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*")
_TEXT_SEPARATOR = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the thirteen tables of a dataset into memory, as the devkit wants them.

    Raises:
        DataError: a table is missing, is not JSON, or is not a list of objects.
    """
    return {name: read_table(folder / f"{name}.json") for name in TABLES}


def read_rig(folder: Path) -> Rig | None:
    """Reads the rig file in the folder of the tables of a dataset whose cameras are not all pinholes.

    Returns:
        The rig; None if there is no such file, and the tables describe the cameras alone.

    Raises:
        DataError: the file is malformed.
    """
    path = folder / RIG_FILE
    return Rig.load(path) if path.is_file() else None


def read_table(path: Path) -> list[dict[str, Any]]:
    """Reads one table into memory, see `read_tables`. `read_blocks` does with a fraction of the memory."""
    return [record for block in read_blocks(path) for record in block.records]


class Block(NamedTuple):
    """Records of a table that follow each other, and where their text is in the file."""

    records: list[dict[str, Any]]
    start: int
    stop: int


class Span(NamedTuple):
    """Bytes of a table that hold whole records."""

    start: int  # of the first record
    stop: int | None  # after the last one; None: the end of the file


def read_blocks(path: Path, span: Span | None = None) -> Iterator[Block]:
    """Reads a table a few thousand records at a time. The tables of nuScenes trainval take 6 GB as objects.

    Args:
        path: the file.
        span: one of `divided`, or from the start of one of them to the end; the whole file by default.

    Raises:
        DataError: the table is missing, is not JSON, or is not a list of objects.
    """
    with _reading(path) as file:
        yield from _read_blocks(path, file, span or Span(_start(path, file), None), found=span is not None)


def divided(path: Path, size: int) -> list[Span]:
    """Divides a table into spans of about `size` bytes, which several processes can read.

    A span ends where one record seems to end and another to start. Strings may hold the same characters: what follows
    is then not valid as JSON, and must be read from the start of the last valid span on, not by spans.

    Raises:
        DataError: as for `read_blocks`, of the start of the file.
    """
    with _reading(path) as file:
        spans = [Span(_start(path, file), None)]
        for place in range(spans[0].start + size, os.fstat(file.fileno()).st_size - size // 2, size):
            file.seek(place)
            text = file.read(BLOCK)
            end = _NEXT.search(text)
            if end and place + end.start() > spans[-1].start:
                stop = end.start() + 1
                start = stop + len(_SEPARATOR.match(text, stop)[0])  # type: ignore[index]
                spans[-1:] = [Span(spans[-1].start, place + stop), Span(place + start, None)]
    return spans


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} is missing: unpack the dataset's metadata again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): unpack the metadata again") from None


def _start(path: Path, file: BinaryIO) -> int:
    """Returns the place of the first record of a list."""
    text = file.read(1000)  # white space before the list is shorter
    opening = _OPENING.match(text)
    if opening is None:
        _refuse(path, text + file.read())
    return opening.end()


def _read_blocks(path: Path, file: BinaryIO, span: Span, found: bool) -> Iterator[Block]:
    """Yields the blocks of a span; `found`: whether a record comes before it."""
    end = os.fstat(file.fileno()).st_size if span.stop is None else span.stop
    file.seek(span.start)
    text, start = b"", span.start  # `text` starts with a record
    while True:
        more = file.read(min(max(BLOCK, len(text)), end - start - len(text)))
        text += more
        last = start + len(text) >= end or not more
        # A block ends where one record ends and another starts. Strings may hold the same characters.
        stop = len(text) if last else _last_end(text)
        try:
            records = json.loads(b"[" + text[:stop] + (b"" if last and span.stop is None else b"]"))
            if last and found and not records:
                raise json.JSONDecodeError("Expecting value", text.decode(errors="replace"), 0)
        except (ValueError, RecursionError) as error:
            if last:
                raise _invalid(path, error, start) from None
            records, stop = _first_records(text)
            if not records and len(text) > LONGEST_RECORD:
                raise _invalid(path, error, start) from None
        if not set(map(type, records)) <= {dict}:
            raise _no_list(path)
        if records:
            found = True
            yield Block(records, start, start + stop)
        if last:
            return
        if records:
            stop += len(_SEPARATOR.match(text, stop)[0])  # type: ignore[index]
        text, start = text[stop:], start + stop


def _last_end(text: bytes) -> int:
    """Returns the place after the last record that seems to end before another one, 0 for none."""
    for start in (max(len(text) - TAIL, 0), 0):
        if stop := max(text.rfind(mark, start) for mark in _BETWEEN) + 1:
            return stop
    return 0


def _first_records(text: bytes) -> tuple[list[Any], int]:
    """Decodes records as long as they are whole and a comma follows: for text that is not valid as one block.

    Returns:
        The records, and the number of bytes that they take.
    """
    try:
        content = text.decode(errors="surrogatepass")
    except UnicodeDecodeError as error:  # the end is in the middle of a letter
        content = text[: error.start].decode(errors="surrogatepass")
    records, start, stop = [], len(content) - len(content.lstrip(" \t\r\n")), 0
    try:
        while True:
            record, end = _DECODER.raw_decode(content, start)
            separator = _TEXT_SEPARATOR.match(content, end)
            if separator is None:
                break
            records.append(record)
            start, stop = separator.end(), end
    except (ValueError, RecursionError):
        pass
    return records, len(content[:stop].encode(errors="surrogatepass"))


def _refuse(path: Path, content: bytes) -> NoReturn:
    """Raises what is wrong with a file that does not start like a list."""
    if content.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{path} is not valid JSON (it is a pointer of Git LFS, not the file): unpack the metadata again"
        )
    try:
        json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise _invalid(path, error, 1) from None
    raise _no_list(path)


def _invalid(path: Path, error: Exception, start: int) -> DataError:
    """Makes the message of a JSON error in the text from byte `start` on, which was decoded after a bracket."""
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        place = start + max(len(error.doc[: error.pos].encode(errors="surrogatepass")) - 1, 0)
        with path.open("rb") as file:
            line = 1 + sum(file.read(min(BLOCK, place - k)).count(b"\n") for k in range(0, place, BLOCK))
        reason = f"{error.msg} in line {line}, at byte {place}"
    return DataError(f"{path} is not valid JSON ({reason}): unpack the metadata again")


def _no_list(path: Path) -> DataError:
    return DataError(f"{path} is not a list of objects, one for each record: unpack the metadata again")
