"""Datasets are generated whole or not at all, with the same bytes on any number of workers."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from nuscenes import NuScenes

from perception.cli.simulate import main as simulate_command
from perception.errors import ConfigError, DataError, PerceptionError
from perception.synthetic import simulate
from perception.synthetic.writer import VERSION, _parts_of_scenes


def tree_hash(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.slow
def test_same_seed_same_bytes_with_any_number_of_workers(tmp_path):
    common = dict(scenes=2, keyframes=2, image_size=(32, 56), sweeps=True)
    simulate(tmp_path / "one", seed=3, workers=1, **common)
    simulate(tmp_path / "two", seed=3, workers=4, **common)  # two processes for each scene
    one, two = tree_hash(tmp_path / "one"), tree_hash(tmp_path / "two")
    assert one == two
    # 6 cameras, 2 keyframes and 4 images between them, 2 scenes.
    assert sum(name.startswith("samples/CAM") for name in one) == 24
    assert sum(name.startswith("sweeps/CAM") for name in one) == 48
    nusc = NuScenes(VERSION, str(tmp_path / "one"), verbose=False)
    first = nusc.get("sample_data", nusc.sample[0]["data"]["CAM_FRONT"])
    times = [first["timestamp"]]
    while first["next"]:
        first = nusc.get("sample_data", first["next"])
        times.append(first["timestamp"])
        assert first["sample_token"] == nusc.sample[1]["token"]  # sweeps belong to the next keyframe
    assert np.allclose(np.diff(times), 1e5)
    assert not list(tmp_path.glob(".*"))  # no temporary files are left
    simulate(tmp_path / "other", seed=4, workers=1, scenes=1, keyframes=1, image_size=(32, 56))
    other = set(tree_hash(tmp_path / "other").values())
    assert len(other & set(one.values())) <= 5  # the tables that are equal in all datasets, the empty map image


def test_scenes_are_divided_only_if_workers_would_be_idle():
    whole = range(7)
    assert _parts_of_scenes(3, 1, 7) == [[whole]] * 3
    assert _parts_of_scenes(4, 2, 7) == [[whole]] * 4
    assert _parts_of_scenes(3, 2, 7) == [[whole], [whole], [range(3), range(3, 7)]]
    assert _parts_of_scenes(1, 64, 7) == [[range(k, k + 1) for k in range(7)]]
    for scenes, workers in ((5, 3), (2, 5), (9, 16)):
        for parts in _parts_of_scenes(scenes, workers, 7):
            assert [sensor for part in parts for sensor in part] == list(whole) and all(parts)


def test_wrong_arguments_are_explained_in_a_sentence(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(DataError, match="full: exists and is not empty"):
        simulate(tmp_path / "full", scenes=1, seed=0)
    with pytest.raises(ConfigError, match="split 'val' is reserved by the nuScenes devkit; give another name"):
        simulate(tmp_path / "a", scenes=1, seed=0, split="val")
    with pytest.raises(ConfigError, match="scenes is 0"):
        simulate(tmp_path / "a", scenes=0, seed=0)
    with pytest.raises(ConfigError, match="workers is 0"):
        simulate(tmp_path / "a", scenes=1, seed=0, workers=0)
    with pytest.raises(DataError, match=r"town: about .* GB will be written, but .* GB are free; give fewer scenes"):
        simulate(tmp_path / "town", scenes=100_000, keyframes=100, seed=0, image_size=(4096, 4096))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-size", "100000x100000"), "height of image_size is 100000; give 16 to 4096"),
        (("--image-size", "256x8"), "width of image_size is 8; give 16 to 4096"),
        (("--image-size", "256x-4"), "width of image_size is -4"),
        (("--scenes", "1000000000"), "scenes is 1000000000; give 1 to 100000"),
        (("--scenes", "1e9"), "argument --scenes: invalid int value: '1e9'"),
        (("--scenes", "-1"), "scenes is -1"),
        (("--keyframes", "0"), "keyframes is 0; give 1 to 119"),
        (("--keyframes", "100000"), "keyframes is 100000; give 1 to 119"),
        (("--rate", "0"), "rate is 0; use one of 1, 2, 5, 10, 20"),
        (("--rate", "1000"), "rate is 1000; use one of"),
        (("--workers", "100000"), "workers is 100000; give 1 to"),
        (("--workers", "0"), "workers is 0"),
        (("--seed", "-1"), "seed is -1; give 0 to"),
        (("--seed", "1" + 40 * "0"), "give 0 to 9223372036854775807"),
        (("--rare", "nan"), "rare is nan; give a number from 0 to 1"),
        (("--out", "file"), "out file is a file; give a folder"),
        (("--out", "/proc/none/town"), "out /proc/none/town cannot be written"),
        (("--json", "."), "--json . is a folder; give a file"),
    ],
)
def test_absurd_requests_are_refused_at_once(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    start = time.time()
    try:
        simulate_command(["--out", "town", *arguments])
        error = ""
    except PerceptionError as refused:
        error = str(refused)
    except SystemExit as refused:
        assert refused.code == 2
        error = capsys.readouterr().err
    assert message in error and time.time() - start < 5
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def children(pid):
    """The processes that a process started, and those they started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
def test_a_killed_run_is_cleaned_up_by_the_next(tmp_path):
    """Kills a run for real: its workers end, the next run removes what it left, and gives the bytes of a clean run."""
    script = Path(__file__).resolve().parent.parent / "scripts" / "simulate.py"
    town = ["--seed", "3", "--keyframes", "1", "--image-size", "32x56"]
    command = [sys.executable, str(script), "--out", str(tmp_path / "town"), "--scenes", "40", "--workers", "2", *town]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 90
    while not list(tmp_path.glob(".town*/samples/*/*.jpg")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    with pytest.raises(DataError, match="town: another run is writing it; wait for it or give another folder"):
        simulate(tmp_path / "town", scenes=1, seed=3, workers=1)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    while any(map(alive, workers)):
        assert time.time() < deadline
        time.sleep(0.05)
    assert [path.name for path in tmp_path.iterdir()] == [".town.partial"]
    for out in ("town", "clean"):
        simulate(tmp_path / out, scenes=1, seed=3, keyframes=1, image_size=(32, 56), workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "town"]
    assert tree_hash(tmp_path / "town") == tree_hash(tmp_path / "clean")


def test_threads_do_not_write_one_folder_at_once(tmp_path):
    """One of two threads makes the dataset, the other is refused; whichever comes late finds it finished."""
    results = []

    def work():
        try:
            simulate(tmp_path / "town", scenes=1, seed=3, keyframes=1, image_size=(32, 56), workers=1)
            results.append("made")
        except DataError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.remove("made")
    assert len(results) == 1 and ("another run is writing it" in results[0] or "is not empty" in results[0])
    assert [path.name for path in tmp_path.iterdir()] == ["town"]


@pytest.mark.slow
def test_interrupted_run_leaves_nothing(tmp_path):
    script = Path(__file__).resolve().parent.parent / "scripts" / "simulate.py"
    out = tmp_path / "town"
    command = [
        sys.executable,
        str(script),
        "--out",
        str(out),
        "--scenes",
        "50",
        "--workers",
        "1",
        "--image-size",
        "32x56",
    ]
    process = subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # Tests that run in the background ignore the signal, and so would the script.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 60
    while not list(tmp_path.glob(".town*/samples/*/*.jpg")):  # until the first images are there
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_town_under_an_official_version_has_the_splits_of_the_devkit(tmp_path):
    from nuscenes.utils.splits import create_splits_scenes

    from perception.data.nuscenes import NuScenesDataset

    common = {"seed": 3, "keyframes": 1, "image_size": (16, 28), "workers": 1}
    simulate(tmp_path / "own", scenes=2, **common)
    simulate(tmp_path / "mini", scenes=2, version="v1.0-mini", **common)
    official = create_splits_scenes()
    for split, count in (("mini_train", 1), ("mini_val", 1)):
        dataset = NuScenesDataset(tmp_path / "mini", "v1.0-mini", split, image_size=(16, 28))
        assert len(dataset.scene_names) == count and set(dataset.scene_names) <= set(official[split])
    own, mini = (path.read_bytes() for path in sorted(tmp_path.glob("*/*/sample_annotation.json"))[::-1])
    assert own == mini  # the scenes are the same, their names are others
    for arguments, sentence in (
        ({"scenes": 2, "version": "v2"}, r"version is 'v2'; give v1\.0-mini, v1\.0-trainval"),
        ({"scenes": 1, "version": "v1.0-mini"}, r"scenes is 1, .* give 2 to 10"),
        (
            {"scenes": 2, "version": "v1.0-mini", "split": "a"},
            "has the splits mini_train and mini_val; leave split out",
        ),
    ):
        with pytest.raises(ConfigError, match=sentence):
            simulate(tmp_path / "none", **common, **arguments)
