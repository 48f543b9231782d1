"""Files are written whole or not at all."""

import json
import os
import signal
import threading
import time

import pytest

from perception.errors import ConfigError
from perception.files import check_space, check_writable, locked, replacing, scratch_folder, write_json


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "numbers.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_json_with_and_without_indent(tmp_path):
    write_json(tmp_path / "a", {"x": [1, 2]}, indent=None)
    assert (tmp_path / "a").read_text() == '{"x":[1,2]}\n'
    write_json(tmp_path / "a", {"x": 1})
    assert (tmp_path / "a").read_text() == '{\n "x": 1\n}\n'


def test_paths_are_checked_without_writing(tmp_path):
    file = tmp_path / "file"
    file.write_text("here")
    check_writable("--json", file)
    check_writable("--json", tmp_path / "new" / "numbers.json")
    check_writable("--out", tmp_path / "new" / "folder", folder=True)
    assert list(tmp_path.iterdir()) == [file]
    for path, folder, message in (
        (tmp_path, False, f"--out {tmp_path} is a folder; give a file"),
        (file, True, f"--out {file} is a file; give a folder"),
        (file / "numbers.json", False, r"numbers.json cannot be written \(.*Not a directory.*\); give another path"),
        ("/proc/numbers.json", False, r"--out /proc/numbers.json cannot be written \(.*; give another path"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_writable("--out", path, folder=folder)


def test_a_full_disk_is_named(tmp_path):
    check_space("--out x", tmp_path, 1)
    with pytest.raises(ConfigError, match=r"--out x needs [\d,]+ MiB and its disk has [\d,]+ MiB left; free some"):
        check_space("--out x", tmp_path, 2**60)


def test_the_folder_of_a_killed_process_is_deleted_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = os.fork()
    if process == 0:
        with scratch_folder("trial") as folder:
            (folder / "file").write_text("left")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    (left,) = tmp_path.iterdir()
    with scratch_folder("trial") as one, scratch_folder("trial") as other:
        assert sorted(tmp_path.iterdir()) == sorted([one, other]) and not left.exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_is_held_by_one_at_a_time_and_leaves_nothing(tmp_path):
    path, inside, most = tmp_path / "new" / ".lock", [], []

    def work() -> None:
        for _ in range(20):
            with locked(path) as held:
                assert held
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80 and not path.exists()
    with locked(path), locked(path, wait=False) as held:
        assert not held
