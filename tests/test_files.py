"""Files are written whole or not at all."""

import json

import pytest

from perception.errors import ConfigError
from perception.files import check_writable, replacing, write_json


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
