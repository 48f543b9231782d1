"""Damages files for tests of their readers: trees of JSON values, bytes and text. The seed decides all."""

import copy
import math
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STRANGE = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e30, 1e300,
    -1e300, math.nan, math.inf, -math.inf, "", "0", "nan", "x", "é", "a/../b", "/etc/passwd", "\0", "\ud800", "car",
    [], [[]], {}, [0], [None], [math.nan] * 3, {"": 0}, [[[[[[[[[[1]]]]]]]]]], "9" * 60,
)  # fmt: skip
TOKENS = (
    b"", b"\0", b"\xff", b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"NaN", b"-", b"1e999", b"0x1",
    b"\n", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 2000, b"9" * 5000, b"..", b"/", b"\xff\xff\xff\x7f", b"\x80",
    b"\x00" * 9,
)  # fmt: skip


def places(tree: object, way: tuple = ()) -> Iterator[tuple]:
    """Yields the ways to all values in a tree of dicts and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*way, key)
        yield from places(value, (*way, key))


def at(tree, way: tuple):
    for key in way:
        tree = tree[key]
    return tree


def damage_tree(tree: object, rng: random.Random, strange: tuple = STRANGE) -> object:
    """Returns a copy with one to three values removed, replaced, scaled, moved, repeated or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        ways = list(places(tree))
        if not ways:
            return rng.choice(strange)
        # First a field, so that the many numbers of arrays do not hide the few fields around them.
        kinds = {tuple(key if isinstance(key, str) else None for key in way): way for way in ways}
        kind = rng.choice(sorted(kinds, key=repr))
        way = rng.choice([w for w in ways if tuple(key if isinstance(key, str) else None for key in w) == kind])
        parent, key = at(tree, way[:-1]), way[-1]
        value = parent[key]
        if type(value) in (int, float) and abs(value) < 1e100 and rng.random() < 0.6:
            scaled = (-value, value * 1000, value / 1000, value + 1, int(value), value * 1e200, value * 1e20, 0)
            parent[key] = rng.choice(scaled)
            continue
        match rng.randrange(9):
            case 0:
                del parent[key]
            case 1 | 2:
                parent[key] = copy.deepcopy(rng.choice(strange))
            case 3:
                parent[key] = str(value)
            case 4:
                parent[key] = copy.deepcopy(at(tree, rng.choice(ways)))
            case 5 if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(value))
            case 6 if isinstance(parent, dict):
                parent[rng.choice(("", "x", str(key).upper(), f"{key} "))] = parent.pop(key)
            case 7:
                parent[key] = [value]
            case 8 if isinstance(value, list):
                rng.shuffle(value)
            case _:
                parent[key] = copy.deepcopy(rng.choice(strange))
    return tree


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Returns bytes with one to four places flipped, removed, repeated or overwritten, or without their end."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 4, 16, 200)))
        match rng.randrange(7):
            case 0 | 1 if start < len(data):
                data = data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
            case 2:
                data = data[:start] + data[end:]
            case 3:
                data = data[:end] + data[start:]
            case 4 if rng.random() < 0.3:
                data = data[:start]
            case 5:
                data = data[:start] + bytes(rng.randrange(256) for _ in range(end - start)) + data[end:]
            case _:
                data = data[:start] + rng.choice(TOKENS) + data[rng.choice((start, end)) :]
    return data


class Hang(Exception):
    """A reader took too long."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises Hang if the block takes longer."""

    def stop(number, frame):
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_cases(name: str, count: int, case: Callable[[random.Random], object], refused: type[Exception]) -> int:
    """Runs a test of a reader on `count` damaged files.

    Args:
        name: seeds the random numbers of all cases.
        count: number of cases.
        case: makes a damaged file from random numbers, reads it, and asserts what has to hold for the result.
        refused: the error that a reader may raise.

    Returns:
        How many files were read, the others were refused.

    Raises:
        AssertionError: other errors came out; the message has a case of each kind.
    """
    read, faults = 0, {}
    for k in range(count):
        try:
            with limit(20):
                case(random.Random(f"{name} {k}"))
            read += 1
        except refused as error:
            text = str(error)
            if not text or "\n" in text or len(text) > 2000:
                faults.setdefault("no sentence", f"case {k}: {text[:300]!r}")
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {place.name}, line {place.lineno} of {place.filename}"
            faults.setdefault(kind, f"case {k}: {kind}: {str(error)[:300]}")
    assert not faults, f"{name}: " + "\n".join(faults.values())
    return read
