"""Writes files atomically and checks paths.

Files are written to a temporary file in the same folder, which is then renamed.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from perception.commands import as_called
from perception.errors import ConfigError, DataError

LEAST_SPACE = 2**24  # bytes that a disk must have left for any output


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` when the block succeeds.

    The temporary file is deleted when the block fails. Missing folders are created. Processes and threads that write
    the same file at the same time use different temporary files, and the last one to finish wins. What a killed process
    of this machine has left of an earlier attempt is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _left_by_dead_processes(path.parent, f".{path.name}"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{_own_name()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        _to_disk(temporary)  # otherwise a power failure may leave the new name with no content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def user_cache() -> Path:
    """Returns the folder for what can be made again: `$PERCEPTION_CACHE`, `$XDG_CACHE_HOME/perception` or
    `~/.cache/perception`. It may not exist, and a user without a home gets one that cannot be written."""
    if folder := os.environ.get("PERCEPTION_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perception"
    except RuntimeError:  # no home, as in some containers
        return Path(os.devnull) / "perception"


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Yields a temporary folder that is deleted after the block, and deletes what a killed process has left of one.

    Args:
        purpose: part of the folder's name.
    """
    parent, prefix = Path(tempfile.gettempdir()), f"perception-{purpose}"
    for left in _left_by_dead_processes(parent, prefix):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}.{_own_name()}.", suffix=".tmp", dir=parent) as folder:
        yield Path(folder)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yields an empty folder next to `out`, and renames it to `out` when the block succeeds.

    A lock on the folder tells a run that is going on from one that was killed. The kernel drops it with the process, so
    what a killed run left is removed here.

    Args:
        out: the folder; it must not exist, or be empty. Missing parents are created.

    Raises:
        DataError: `out` is not empty, another run is writing it, or it cannot be written.
    """
    out = Path(out)
    if not out.name:  # "." and ".."
        out = out.resolve()
    root = out.with_name(f".{out.name}.partial")
    while True:
        check_new(out)
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(root, os.O_RDONLY)
        except FileNotFoundError:  # another run has just finished
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), root.stat()):
                break
        except BlockingIOError:
            os.close(lock)
            raise DataError(f"{out}: another run is writing it; wait for it or give another folder") from None
        except FileNotFoundError:
            pass
        os.close(lock)
    try:
        for left in root.iterdir():  # by a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield root
        os.replace(root, out)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); make room or give another folder"
        ) from error
    finally:
        shutil.rmtree(root, ignore_errors=True)
        os.close(lock)


def check_new(out: str | Path) -> None:
    """Checks that a folder to create does not exist, or is empty.

    Raises:
        DataError: it is there, and not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not empty; remove it or give another folder")


def _own_name() -> str:
    return f"{socket.gethostname()}.{os.getpid()}"


def _left_by_dead_processes(folder: Path, name: str) -> list[Path]:
    """Temporary files and folders of a name whose process on this machine has ended."""
    found = folder.glob(f"{glob.escape(f'{name}.{socket.gethostname()}')}.*.tmp")
    processes = {left: left.name.split(".")[-3] for left in found}
    return [left for left, number in processes.items() if number.isdecimal() and not _is_running(int(number))]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process, or not a number of a process
        pass
    return True


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file, so that one process or thread at a time runs the block. The lock ends with its process.

    Args:
        path: the lock file; it is created, and removed after the block.
        wait: wait for the lock. If False, and another one has it, the block runs without it.

    Yields:
        Whether the lock is held.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not _is_at(file.fileno(), path):  # the process before has removed the file
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_json(path: str | Path, content: object, indent: int | None = 1) -> None:
    """Writes a JSON file atomically, on one line if `indent` is None."""
    separators = (",", ":") if indent is None else None
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, separators=separators) + "\n", encoding="utf-8")


def check_writable(option: str, path: str | Path, *, folder: bool = False) -> None:
    """Checks that an output file or folder can be written. Call it before long work; it leaves no files behind.

    Args:
        option: name of the command-line option or argument that gave the path, for messages.
        path: the file or folder; it does not have to exist.
        folder: True if `path` is a folder.

    Raises:
        ConfigError: `path` is a folder and a file is expected, or the reverse, or it cannot be written.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        found, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
        raise ConfigError(f"{option} {path} is {found}; give {wanted}")
    existing = path if folder else path.parent
    while not existing.exists():
        existing = existing.parent
    try:
        # A trial write, because permission bits do not apply to root.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written ({error}); give another path") from None
    check_space(f"{option} {path}", existing, LEAST_SPACE)


def check_space(what: str, folder: str | Path, needed: float) -> None:
    """Checks that the disk of a folder has room. Call it before long work.

    Args:
        what: names the output, for the message.
        folder: an existing folder.
        needed: bytes that will be written.

    Raises:
        ConfigError: the disk has fewer bytes left.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{what} needs {needed / 2**20:,.0f} MiB and its disk has {free / 2**20:,.0f} MiB left; free some, or give "
            "a path on another disk"
        )


def check_dataset(
    dataroot: str | Path | Sequence[str | Path], version: str, make_with: Mapping[str, str] | None = None
) -> None:
    """Checks that the folders of tables of a dataset exist.

    Args:
        dataroot: root of the dataset, or several roots.
        version: name of the folder of tables.
        make_with: by root the command that creates it, such as `perception simulate ...`.

    Raises:
        DataError: a folder does not exist; the message holds the commands for exactly what is missing, as the user must
            call them.
    """
    roots = [str(dataroot)] if isinstance(dataroot, str | Path) else list(dict.fromkeys(map(str, dataroot)))
    if missing := [root for root in roots if not Path(root, version).is_dir()]:
        commands = [(make_with or {}).get(root, "") for root in missing]
        fix = "give the root and the version folder of a dataset"
        if all(commands):
            fix = f"make it with: {as_called(' && '.join(commands))}"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"dataset {Path(missing[0], version)}{more} does not exist; {fix}")
