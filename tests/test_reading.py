"""Values of foreign files, their texts in messages, and files that cannot be read."""

import math

import numpy as np
import pytest

from perception.data.splits import custom_splits
from perception.data.table_files import read_table
from perception.errors import EXTRAS, ConfigError, DataError, not_installed
from perception.models import preset_name
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.reading import number, numbers, parse_json, read_bytes, short, typed


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int8(3)])
def test_numbers_of_any_type(value):
    assert number(value) == 3 and type(number(value)) is float


@pytest.mark.parametrize("value", [10**400, True, "3", None, [3], np.bool_(True), 1j])
def test_what_is_no_number_is_infinite(value):
    assert number(value) == math.inf


def test_lists_of_numbers():
    assert numbers([1, 2], "a", 2) == numbers((1, 2), "a", 2) == numbers(np.array([1, 2]), "a", 2) == [1, 2]
    assert numbers([1, 2, 3], "a", 2, more=1) == [1, 2, 3]
    assert math.isnan(numbers([1, math.nan], "a", 2, allow_nan=True)[1])
    for value, options in (
        ([1], {}), ([1, 2, 3], {}), ([1, 2, 3, 4], {"more": 1}), ([1, math.nan], {}), ([1, "2"], {}), ("12", {}),
        ([1, math.inf], {"allow_nan": True}), (np.ones((2, 1)), {}), ([], {}), (None, {}),
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"^box is .*; give 2 finite numbers$"):
            numbers(value, "box", 2, **options)


def test_values_of_another_type_are_named():
    assert typed({}, dict, "a", "an object") == {}
    with pytest.raises(DataError, match=r'^a\.b is "x"; it must be an object$'):
        typed("x", dict, "a.b", "an object")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null or missing"), ("a\n b", '"a\\n b"'), ([1, 2.5, True], "[1, 2.5, true]"), ({"a": 1}, '{"a": 1}'),
        (b"ab", "b'ab'"), (object, "of type type"), ({1, 2}, "of type set"), ("x" * 58, f'"{"x" * 58}"'),
        ("x" * 59, f'"{"x" * 56}...'),
    ],
)  # fmt: skip
def test_values_in_messages(value, text):
    assert short(value) == text and len(text) <= 60


def test_values_that_have_no_text():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, 10**10_000, [10**10_000]):
        text = short(value)
        assert 0 < len(text) <= 60 and "\n" not in text


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder, pointer = tmp_path / "folder.json", tmp_path / "pointer.json"
    folder.mkdir()
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    nowhere = tmp_path / "nowhere.json"
    for read in (read_table, custom_splits, lambda path: read_bytes(path, "a rig")):
        with pytest.raises(DataError, match=r"folder\.json cannot be read \(Is a directory\)"):
            read(folder)
    assert custom_splits(nowhere) == {}
    with pytest.raises(DataError, match=r"nowhere\.json is missing: unpack"):
        read_table(nowhere)
    with pytest.raises(DataError, match=r"nowhere\.json is missing: give the path of a rig"):
        read_bytes(nowhere, "a rig")
    with pytest.raises(
        DataError, match=r"pointer\.json is not valid JSON \(it is a pointer of Git LFS, not the file\)"
    ):
        read_table(pointer)
    with pytest.raises(DataError, match=r"pointer\.json is not valid JSON \(Expecting value"):
        custom_splits(pointer)
    with pytest.raises(DataError, match=r"pointer\.json is not valid JSON .*: give an info file"):
        parse_json(pointer, pointer.read_bytes(), "an info file")
    assert parse_json(pointer, b"[1]", "") == [1]


def test_packages_of_extras_are_named():
    for extra, packages in EXTRAS.items():
        for package in packages:
            found = not_installed(ModuleNotFoundError(f"No module named '{package}'", name=f"{package}.part"))
            assert isinstance(found, ConfigError)
            assert str(found) == f"{package} is not installed; install it, or the extra [{extra}] of driving-perception"
    assert not_installed(ModuleNotFoundError("no", name="perception.nowhere")) is None
    assert not_installed(ImportError("no")) is None


def test_presets_have_names():
    for name, make in BEVTransformerConfig.presets().items():
        assert preset_name(make()) == name
    with pytest.raises(ConfigError, match="no preset of BEVTransformerConfig has these values"):
        preset_name(BEVTransformerConfig.preset("nano", channels=16))
