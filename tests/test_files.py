"""Files appear whole or not at all."""

import json

import pytest

from perception.files import replacing, write_json


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "numbers.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), replacing(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_json_for_people_and_for_machines(tmp_path):
    write_json(tmp_path / "a", {"x": [1, 2]}, indent=None)
    assert (tmp_path / "a").read_text() == '{"x":[1,2]}\n'
    write_json(tmp_path / "a", {"x": 1})
    assert (tmp_path / "a").read_text() == '{\n "x": 1\n}\n'
