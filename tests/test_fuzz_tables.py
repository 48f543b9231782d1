"""Random damage to tables and maps: only PerceptionError comes out, in bounded time, and what loads is plausible."""

import contextlib
import copy
import json
import os
import shutil
import signal
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from perception.data.checked_tables import check_tables
from perception.data.nuscenes import NuScenesDataset
from perception.data.table_files import TABLES
from perception.errors import PerceptionError
from perception.evaluation.detection import evaluate_boxes
from perception.geometry import is_rigid
from perception.types import LaneRange, map_tensors

VERSION, SPLIT, CAMERAS = "v1.0-hand", "hand_val", ("CAM_FRONT", "CAM_BACK")
SECONDS = 20  # of one case; all take far less
MAP = "map expansion"

VALUES = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e30, 1e308, float("nan"), float("inf"),
    float("-inf"), "", "x", "\0", "\ud800", "../..", "/etc/passwd", "CAM_FRONT", "vehicle.car", "a" * 5000, [], [[]],
    [None], [0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1e200, 1e200, 1e200], [[1, 0, 0], [0, 1, 0], [0, 0, 1]], {},
    {"token": "x"},
]  # fmt: skip


def places(content, path=()):
    """All paths into nested lists and objects."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def at(content, path):
    for key in path:
        content = content[key]
    return content


def mutate(rng, content):
    """Damages one random place of a JSON document, and returns a description."""
    found = [p for p in places(content) if p]
    path = found[rng.integers(len(found))]
    parent, key = at(content, path[:-1]), path[-1]
    kind = rng.choice(["value", "value", "other", "other", "remove", "repeat", "scale", "swap"])
    if kind == "value":
        parent[key] = VALUES[rng.integers(len(VALUES))]
    elif kind == "other":  # the value of another place of the same kind, such as another record's token
        others = [p for p in places(content) if p and p[-1] == key and len(p) == len(path)]
        parent[key] = copy.deepcopy(at(content, others[rng.integers(len(others))]))
    elif kind == "remove":
        del parent[key]
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(int(rng.integers(len(parent) + 1)), copy.deepcopy(parent[key]))
    elif kind == "scale" and isinstance(parent[key], int | float) and abs(parent[key]) < 1e300:
        parent[key] *= float(rng.choice([-1.0, 1e-6, 0.5, 1e3, 1e6]))
    elif kind == "swap" and len(parent) > 1:
        other = (list(parent) if isinstance(parent, dict) else range(len(parent)))[rng.integers(len(parent))]
        parent[key], parent[other] = parent[other], parent[key]
    return f"{kind} at {path}"


@contextlib.contextmanager
def deadline(case):
    def stop(*_):
        raise TimeoutError(f"{case} takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_plausible(data):
    """What no dataset may hold, whatever its tables are."""
    index = data._index
    assert len(set(index.token)) == len(index.token) > 0
    assert all(is_rigid(pose) for pose in (*index.global_from_ego, *index.ego_from_lidar))
    assert all(is_rigid(pose) for pose in index.ego_from_cam.reshape(-1, 4, 4))
    assert (index.img_from_cam[..., [0, 1], [0, 1]] > 0).all() and np.isfinite(index.img_from_cam).all()
    assert (index.box_size > 0).all() and all(np.isfinite(x).all() for x in (index.box_center, index.box_size))
    assert np.isfinite(index.box_yaw).all() and not np.isinf(index.box_velocity).any()
    assert np.isfinite(index.lines.vertices).all() and np.isfinite(index.wide_lines.vertices).all()
    later = index.previous >= 0
    assert (index.timestamp_us[later] > index.timestamp_us[index.previous[later]]).all()
    assert (index.scene[later] == index.scene[index.previous[later]]).all()
    root = os.path.realpath(data.roots[0])
    for path in (*index.image_path.ravel(), *index.scene_map):
        assert not path or os.path.normpath(os.fsdecode(path)).startswith(str(data.roots[0]) + os.sep), (path, root)


def run(root, rng, evaluate):
    """Damages a dataset, reads it and returns what came of it."""
    documents = [*TABLES, MAP, MAP]
    name = documents[rng.integers(len(documents))]
    path = root / "maps" / "expansion" / "hand-town.json" if name == MAP else root / VERSION / f"{name}.json"
    whole = path.read_text()
    case = name
    try:
        if rng.random() < 0.05:  # a torn or damaged file
            place = int(rng.integers(len(whole)))
            path.write_text(whole[:place] if rng.random() < 0.5 else whole[:place] + "}" + whole[place + 1 :])
            case += f", text damaged at {place}"
        else:
            content = json.loads(whole)
            for _ in range(rng.integers(1, 3)):
                if content:
                    case += f", {mutate(rng, content)}"
            path.write_text(json.dumps(content))
        with deadline(case), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused = any(finding.severity == "error" for finding in check_tables(root, VERSION))
            try:
                data = NuScenesDataset(
                    root, VERSION, SPLIT, image_size=(45, 80), cameras=CAMERAS, cache_dir="/dev/null/none"
                )
                assert not refused, f"{case}: has an error and was read"
                check_plausible(data)
                for i in range(len(data)):
                    clip = data[i]
                    seconds, is_first = float(clip.frames.seconds_since_prev), bool(clip.frames.is_first)
                    assert (seconds == 0) if is_first else (0 < seconds <= 2)
                    assert all(torch.isfinite(x).all() for x in (*clip.frames.rig, clip.frames.ego_from_prev))
                    data.gt_lines(i, "streammapnet", LaneRange(100, 50))
                    assert all(np.isfinite(points).all() for points in data.gt_centerlines(i).points)
                if evaluate:
                    gt = {token: map_tensors(lambda x: x[0], data[i].gt) for i, token in enumerate(data.tokens)}
                    poses = {token: data.ego_pose(i) for i, token in enumerate(data.tokens)}
                    evaluate_boxes(gt, poses, root, VERSION, SPLIT)
                return "read"
            except PerceptionError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000, case
                assert refused or not str(error).startswith("the nuScenes devkit"), case
                return "refused"
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}"[:500]) from error
    finally:
        path.write_text(whole)


def damageable(hand_root, root):
    """Copies the dataset and adds a lane graph to its map: two lanes along the road and their link."""
    shutil.copytree(hand_root, root)
    path = root / "maps" / "expansion" / "hand-town.json"
    content = json.loads(path.read_text())
    content["lane"] = [{"token": "a", "polygon_token": "p"}, {"token": "b", "polygon_token": "p"}]
    content["lane_connector"] = []
    starts = {"a": [500, 800, 0.52], "b": [517.4, 810, 0.52]}
    content["arcline_path_3"] = {
        token: [{"start_pose": start, "shape": "LSR", "radius": 50.0, "segment_length": [5, 10, 5]}]
        for token, start in starts.items()
    }
    content["connectivity"] = {"a": {"incoming": [], "outgoing": ["b"]}, "b": {"incoming": ["a"], "outgoing": []}}
    path.write_text(json.dumps(content))
    return root


def fuzz(hand_root, tmp_path, seed, cases):
    root = damageable(hand_root, tmp_path / "root")
    rng = np.random.default_rng(seed)
    outcomes = Counter(run(root, rng, evaluate=True) for _ in range(cases))
    # Damage is neither ignored nor is everything refused.
    assert min(outcomes["read"], outcomes["refused"]) > cases / 10, outcomes


def test_damaged_tables_are_refused_or_read_right(hand_root, tmp_path):
    fuzz(hand_root, tmp_path, 0, 60)


@pytest.mark.slow
def test_many_damaged_tables_are_refused_or_read_right(hand_root, tmp_path):
    fuzz(hand_root, tmp_path, 1, 1000)
