"""Shows the progress of long work on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stage(name: str, progress: bool) -> Iterator[None]:
    """Prints the name of a block when it starts and its duration when it succeeds, if `progress` is True."""
    if progress:
        print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    if progress:
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
