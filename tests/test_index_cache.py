"""The stored index of a dataset survives damage, kills, threads and processes, and is never stale."""

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from perception.data import index_files
from perception.data.index import load_index
from perception.data.nuscenes import NuScenesDataset
from perception.data.table_files import TABLES
from perception.errors import PerceptionWarning
from perception.types import DEFAULT_LANE_RANGE

VERSION, SPLIT, CAMERAS = "v1.0-hand", "hand_val", ("CAM_FRONT", "CAM_BACK")


@pytest.fixture
def root(hand_root, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(hand_root, tmp_path / "root")


def read(root, tmp_path, **changes):
    options = {"image_size": (90, 160), "cameras": CAMERAS, "cache_dir": tmp_path / "cache"} | changes
    return NuScenesDataset(root, VERSION, SPLIT, **options)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "other", "flipped"])
def test_any_damaged_cache_is_made_again(hand_root, tmp_path, damage):
    want = read(hand_root, tmp_path)[0]
    (cache,) = (tmp_path / "cache").iterdir()
    whole = cache.read_bytes()
    if damage == "other":
        with cache.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        content = {"empty": b"", "half": whole[:middle], "text": b"<html>", "flipped": flipped}[damage]
        cache.write_bytes(content)
    with pytest.warns(PerceptionWarning, match=r"index cache .*\.bin cannot be read .*; it is made again"):
        again = read(hand_root, tmp_path)[0]
    assert torch.equal(again.gt.boxes.center, want.gt.boxes.center)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(hand_root, tmp_path)


@pytest.mark.parametrize("folder", ["/proc/perception", "file/cache"])
def test_a_cache_that_cannot_be_written_is_done_without(hand_root, tmp_path, monkeypatch, folder):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERCEPTION_CACHE", str(tmp_path / folder))
    with pytest.warns(
        PerceptionWarning, match=r"cannot be written .*cache_dir or in the environment variable PERCEPTION"
    ):
        assert len(read(hand_root, tmp_path, cache_dir=None)) == 6


def test_the_environment_gives_the_folder_of_the_cache(hand_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEPTION_CACHE", str(tmp_path / "here"))
    read(hand_root, tmp_path, cache_dir=None)
    assert [path.suffix for path in (tmp_path / "here").iterdir()] == [".bin"]


def _load(arguments):
    root, cache = arguments
    index = load_index(Path(root), VERSION, SPLIT, CAMERAS, DEFAULT_LANE_RANGE, Path(cache))
    return index.box_center.sum(), index.lines.vertices.sum()


def test_threads_build_one_cache(hand_root, tmp_path):
    results, errors = [], []

    def work():
        try:
            results.append(_load((hand_root, tmp_path / "cache")))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 4 and len(set(results)) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".bin"]


def test_processes_build_one_cache(hand_root, tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_load, [(hand_root, tmp_path / "cache")] * 4, chunksize=1)
    assert len(set(results)) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".bin"]


def _build_forever(root, cache):
    tqdm.set_lock(threading.RLock())  # its usual lock is shared with the parent, and would stay locked after a kill
    while True:
        for path in Path(cache).glob("*.bin"):
            path.unlink()
        _load((root, cache))


def test_killed_builds_leave_no_damaged_cache(hand_root, tmp_path):
    want = _load((hand_root, tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for _ in range(12):
        child = multiprocessing.get_context("fork").Process(target=_build_forever, args=(hand_root, tmp_path / "cache"))
        child.start()
        time.sleep(rng.uniform(0.0, 0.3))
        child.kill()
        child.join()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _load((hand_root, tmp_path / "cache")) == want


def test_an_edited_split_makes_another_index(root, tmp_path):
    assert read(root, tmp_path).scene_names == ["hand-0", "hand-1"]
    (root / VERSION / "splits.json").write_text(json.dumps({SPLIT: ["hand-1"]}))
    assert read(root, tmp_path).scene_names == ["hand-1"]


def test_the_check_does_not_load_the_devkit_for_a_stored_index(hand_root, tmp_path, monkeypatch):
    read(hand_root, tmp_path)
    monkeypatch.setitem(sys.modules, "nuscenes.nuscenes", None)
    assert len(read(hand_root, tmp_path)) == 6


def index_of(root, cache):
    return load_index(root, VERSION, SPLIT, CAMERAS, DEFAULT_LANE_RANGE, cache)


def test_a_stored_index_is_mapped_and_never_written(hand_root, tmp_path):
    built = index_of(hand_root, tmp_path)
    stored = index_of(hand_root, tmp_path)
    (path,) = tmp_path.glob("index-*.bin")
    content = path.read_bytes()
    for name in ("box_center", "ego_from_cam", "image_path", "box_label"):
        array, want = getattr(stored, name), getattr(built, name)
        assert array.dtype == want.dtype and np.array_equal(array, want) and array.flags.aligned
        base = array
        while base.base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap), name
    assert np.array_equal(stored.wide_lines.vertices, built.wide_lines.vertices)
    stored.box_center[:] = 7
    assert path.read_bytes() == content and np.array_equal(index_of(hand_root, tmp_path).box_center, built.box_center)


def test_a_file_of_other_arrays_is_no_index(tmp_path):
    arrays = {"a": np.arange(3), "b.c": np.array([b"x", b"long"])}
    index_files.write(tmp_path / "x.bin", arrays)
    found = index_files.read(tmp_path / "x.bin", set(arrays))
    assert {name: array.tolist() for name, array in found.items()} == {"a": [0, 1, 2], "b.c": [b"x", b"long"]}
    with pytest.warns(PerceptionWarning, match=r"x\.bin cannot be read \(ValueError: it holds other arrays\)"):
        assert index_files.read(tmp_path / "x.bin", {"a"}) is None
    assert index_files.read(tmp_path / "none.bin", {"a"}) is None


def test_hashes_of_large_files_are_kept_until_they_change(hand_root, tmp_path, monkeypatch):
    root = shutil.copytree(hand_root, tmp_path / "root")
    monkeypatch.setattr(index_files, "KEPT_HASH", 1)
    index_of(root, tmp_path / "cache")
    few = len(list((tmp_path / "cache").glob("hash-*")))
    assert few < len(TABLES)  # those of the code: the tables have changed just now
    monkeypatch.setattr(index_files, "SETTLED_NS", -(10**12))
    index_of(root, tmp_path / "cache")
    kept = list((tmp_path / "cache").glob("hash-*.json"))
    assert len(kept) > len(TABLES) and len(list((tmp_path / "cache").glob("index-*"))) == 1

    path = root / VERSION / "sample_annotation.json"
    state, content = path.stat(), path.read_text()
    path.write_text(content.replace("4.5", "4.6"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size and path.stat().st_mtime_ns == state.st_mtime_ns
    assert np.isclose(index_of(root, tmp_path / "cache").box_size, 4.6).any()

    for hash_file in kept:  # what is kept is used, and what is malformed is not
        hash_file.write_text(json.dumps(json.loads(hash_file.read_text()) | {"hash": "00"}))
    index_of(root, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("index-*"))) == 3
    for hash_file in kept:
        hash_file.write_text("[]")
    index_of(root, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("index-*"))) == 3
