"""Split files, leakage against distances known by hand, and geographic splits against a slow check of all pairs."""

import itertools
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perception.data.geographic_split import geographic_split, scenes_within
from perception.data.leakage import Keyframes, draw_leakage, measure_leakage, read_keyframes
from perception.data.nuscenes import NuScenesDataset
from perception.data.splits import is_official, is_split_file, read_split_file, split_scenes, write_split_file
from perception.errors import ConfigError, DataError
from perception.evaluation.detection import evaluate_boxes, evaluate_submission, load_tables, split_tokens
from perception.types import FrameObjects, Polylines

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "prepare_nuscenes.py"
NORTH, PORT = "singapore-onenorth", "boston-seaport"
# Positions of keyframes by hand: scene -> location, xy of each keyframe.
#   val-a against train-a: (3, 4) is 5 m from (0, 0); (100, 12) is 12 m and (100, 60) 60 m from (100, 0); (0, 61) is
#   61 m from (0, 0). "Within" includes equality, so 1, 2 and 3 of 4 keyframes lie within 5, 20 and 60 m.
#   val-b against train-b: (1000, 1003) is 3 m from (1000, 1000). (0, 0) is a position of train-a, but on another map,
#   and is 1,400 m from train-b. So 1 of 2 keyframes lies within each distance.
POSITIONS = {
    "train-a": (NORTH, [(0, 0), (100, 0)]),
    "val-a": (NORTH, [(3, 4), (100, 12), (100, 60), (0, 61)]),
    "train-b": (PORT, [(1000, 1000)]),
    "val-b": (PORT, [(0, 0), (1000, 1003)]),
}


def write_tables(root: Path, positions: dict, splits: dict) -> None:
    """Writes nuScenes tables with a LiDAR and one camera 700 m away, whose pose must not count."""
    tables = {
        name: []
        for name in ("category", "attribute", "visibility", "instance", "sample_annotation", "ego_pose", "sample")
    }
    tables |= {"log": [], "scene": [], "sample_data": [], "calibrated_sensor": [], "map": []}
    tables["sensor"] = [
        {"token": "LIDAR_TOP", "channel": "LIDAR_TOP", "modality": "lidar"},
        {"token": "CAM_FRONT", "channel": "CAM_FRONT", "modality": "camera"},
    ]
    turn = [1.0, 0.0, 0.0, 0.0]
    for sensor in ("LIDAR_TOP", "CAM_FRONT"):
        mount = {"token": sensor, "sensor_token": sensor, "translation": [0, 0, 0], "rotation": turn}
        intrinsic = [[80, 0, 80], [0, 80, 45], [0, 0, 1]] if sensor == "CAM_FRONT" else []
        tables["calibrated_sensor"].append(mount | {"camera_intrinsic": intrinsic})
    (root / "v1.0-positions").mkdir(parents=True)
    (root / "maps").mkdir()
    Image.new("L", (8, 8)).save(root / "maps" / "mask.png")
    for scene, (location, xy) in positions.items():
        tables["log"].append({"token": f"log-{scene}", "logfile": "", "location": location})
        row = {"token": f"t-{scene}", "name": scene, "log_token": f"log-{scene}"}
        tables["scene"].append(row | {"first_sample_token": f"{scene}-0"})
        for k, (x, y) in enumerate(xy):
            token, ends = f"{scene}-{k}", {"prev": "", "next": ""}
            near = {"prev": f"{scene}-{k - 1}" if k else "", "next": f"{scene}-{k + 1}" if k + 1 < len(xy) else ""}
            tables["sample"].append({"token": token, "timestamp": 10**6 * k, "scene_token": f"t-{scene}"} | near)
            for sensor, away, height in (("LIDAR_TOP", 0, 30.0 * k), ("CAM_FRONT", 700, 0.0)):
                pose = {"token": f"{token}-{sensor}", "rotation": turn, "timestamp": 10**6 * k}
                tables["ego_pose"].append(pose | {"translation": [x + away, y, height]})
                data = {"token": f"{token}-{sensor}", "sample_token": token, "ego_pose_token": f"{token}-{sensor}"}
                data |= {"calibrated_sensor_token": sensor, "filename": "a.jpg", "is_key_frame": True} | ends
                tables["sample_data"].append(data | {"timestamp": 10**6 * k, "width": 160, "height": 90})
    logs = [row["token"] for row in tables["log"]]
    tables["map"] = [{"token": "map", "log_tokens": logs, "category": "", "filename": "maps/mask.png"}]
    for name, rows in tables.items():
        (root / "v1.0-positions" / f"{name}.json").write_text(json.dumps(rows))
    (root / "v1.0-positions" / "splits.json").write_text(json.dumps(splits))


@pytest.fixture(scope="module")
def positions_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("positions")
    write_tables(root, POSITIONS, {"far_train": ["train-a", "train-b"], "far_val": ["val-a", "val-b"]})
    return root


def line_of_scenes(xs, location=NORTH, start=0, length=1) -> Keyframes:
    """Makes scenes of `length` keyframes each, 1 m apart along y, at the given x."""
    xy = np.array([(x, y) for x in xs for y in range(length)], dtype=np.float64)
    names = tuple(f"s{start + k}" for k in range(len(xs)))
    return Keyframes(xy, np.repeat(np.arange(len(xs)), length), names, (location,) * len(xs))


def concatenated(*parts: Keyframes) -> Keyframes:
    starts = np.cumsum([0, *(len(part.scene_name) for part in parts)])
    return Keyframes(
        np.concatenate([part.xy for part in parts]),
        np.concatenate([part.scene + start for part, start in zip(parts, starts, strict=False)]),
        sum((part.scene_name for part in parts), ()),
        sum((part.location for part in parts), ()),
    )


def shortest(keyframes: Keyframes, first, second) -> float:
    """Returns the shortest distance between keyframes of two sets of scenes on the same map, by all pairs."""
    xy = {name: keyframes.xy[keyframes.scene == k] for k, name in enumerate(keyframes.scene_name)}
    location = dict(zip(keyframes.scene_name, keyframes.location, strict=True))
    pairs = [(a, b) for a, b in itertools.product(first, second) if location[a] == location[b]]
    return min((np.linalg.norm(xy[a][:, None] - xy[b], axis=-1).min() for a, b in pairs), default=np.inf)


def test_official_splits_are_those_of_the_devkit():
    assert all(map(is_official, ("train", "val", "test", "mini_train", "mini_val", "train_detect", "train_track")))
    assert not any(map(is_official, ("my_val", "val.txt", "town_val", Path("val.txt"), "Val")))


def test_is_split_file():
    files = [Path("val"), "val.txt", "scenes.json", "some/val", "/some/val"]
    names = ["val", "mini_val", "town_val", "v1.0-val"]
    assert [is_split_file(split) for split in files + names] == [True] * 5 + [False] * 4


def test_reading_and_writing_a_split_file(tmp_path):
    (tmp_path / "a.txt").write_text("# why\n\n scene-2 \nscene-1\nscene-2\n")
    (tmp_path / "a.json").write_text('["scene-2", "scene-1"]')
    assert read_split_file(tmp_path / "a.txt") == read_split_file(tmp_path / "a.json") == ["scene-2", "scene-1"]
    write_split_file(tmp_path / "deep" / "b.txt", ["scene-3", "scene-1"], "made by hand")
    assert read_split_file(tmp_path / "deep" / "b.txt") == ["scene-3", "scene-1"]
    assert (tmp_path / "deep" / "b.txt").read_text().startswith("# made by hand\n")


def test_bad_split_files(tmp_path):
    contents = {
        "gone.txt": (None, "gone.txt cannot be read"),
        "empty.txt": (b"# nothing\n", "lists no scene"),
        "binary.txt": (b"\xff\xfe\x00", "not UTF-8"),
        "broken.json": (b'["a",', "not valid JSON"),
        "dict.json": (b'{"train": ["a"]}', "not a JSON list"),
        "numbers.json": (b"[1, 2]", "not a JSON list"),
        "unknown.txt": (b"a\nb\nx\n", r'lists 1 of 3 scenes that .*scene\.json lacks, such as "x"'),
    }
    for name, (content, message) in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            split_scenes(tmp_path / name, tmp_path, ["a", "b"])


def test_scenes_of_a_split_come_in_the_order_of_the_dataset(tmp_path):
    (tmp_path / "some.txt").write_text("c\na\n")
    (tmp_path / "splits.json").write_text('{"mine": ["c", "b", "elsewhere"]}')
    assert split_scenes(tmp_path / "some.txt", tmp_path, ["a", "b", "c"]) == ["a", "c"]
    assert split_scenes("mine", tmp_path, ["a", "b", "c"]) == ["b", "c"]  # a named split may list missing scenes
    mini = ["scene-0916", "scene-0001", "scene-0103"]
    assert split_scenes("mini_val", tmp_path / "v1.0-mini", mini) == ["scene-0916", "scene-0103"]


def test_training_and_evaluation_resolve_a_split_alike(positions_root, tmp_path):
    """A dataset refuses, before anything is trained, what the evaluation would refuse."""
    root = tmp_path / "root"
    shutil.copytree(positions_root, root)
    tables = root / "v1.0-positions"
    custom = {"far_val": ["val-a", "val-b"], "val": ["val-a"], "empty": [], "elsewhere": ["scene-0001"]}
    (tables / "splits.json").write_text(json.dumps(custom))
    (tmp_path / "listed.txt").write_text("val-b\n")
    (tmp_path / "unknown.txt").write_text("val-b\nval-c\n")
    nusc = load_tables(root, "v1.0-positions")
    names = [scene["name"] for scene in nusc.scene]
    assert split_scenes("far_val", tables, names) == ["val-a", "val-b"] and len(split_tokens(nusc, "far_val")) == 6
    assert len(split_tokens(nusc, tmp_path / "listed.txt")) == 2
    refused = {
        "val": r"split val is an official one.* ending in trainval, not for v1\.0-positions; list your scenes under",
        "mini_val": "ending in mini", "test": "ending in test", "empty": 'holds no scene of split "empty"',
        "elsewhere": "holds no scene", "far": 'no split "far"; known are "elsewhere", "empty", "far_val", "val"',
        tmp_path / "unknown.txt": 'such as "val-c"',
    }  # fmt: skip
    for split, message in refused.items():
        for resolve in (
            lambda split: NuScenesDataset(root, "v1.0-positions", split, image_size=(9, 16), cache_dir=tmp_path / "c"),
            lambda split: split_tokens(nusc, split),
            lambda split: evaluate_submission(nusc, split, {"meta": {}, "results": {}}),
        ):
            with pytest.raises(DataError, match=message):
                resolve(split)
    for content, message in (
        ("{", "is not valid JSON"), ("[]", "not an object with a list of scene names"), ('{"a": "b"}', "not an object"),
        ('{"far_val": [7]}', "not an object with a list"), ("[" * 9999, "not valid JSON"), ("\xff", "not valid JSON"),
    ):  # fmt: skip
        (tables / "splits.json").write_bytes(content.encode("latin1"))
        with pytest.raises(DataError, match=message):
            split_tokens(nusc, "far_val")


def test_dataset_of_a_split_file(hand_root, tmp_path):
    def tokens(split):
        return NuScenesDataset(hand_root, "v1.0-hand", split, image_size=(90, 160), cache_dir=tmp_path / "cache").tokens

    listed = tmp_path / "mine.txt"
    listed.write_text("hand-1\n")
    assert tokens(listed) == tokens(str(listed)) == tokens("hand_second") == ["s1-0", "s1-1", "s1-2"]
    indices = len(list((tmp_path / "cache").iterdir()))
    (tmp_path / "copy.json").write_text('["hand-1"]')
    assert tokens(tmp_path / "copy.json") == tokens(listed)
    assert len(list((tmp_path / "cache").iterdir())) == indices  # the same scenes share an index
    listed.write_text("hand-0\n")
    assert tokens(listed) == ["s0-0", "s0-1", "s0-2"]  # a changed file of the same name is read again
    listed.write_text("hand-0\nhand-7\n")
    with pytest.raises(DataError, match='such as "hand-7"'):
        tokens(listed)


def test_official_detection_score_of_a_split_file(hand_root, tmp_path):
    data = NuScenesDataset(hand_root, "v1.0-hand", "hand_val", image_size=(90, 160), cache_dir=tmp_path / "cache")
    nothing = Polylines(*[torch.zeros(0)] * 6)
    scenes, poses = {}, {}
    for i, token in enumerate(data.tokens):
        boxes = data.gt_boxes(i)
        if token == "s0-1":  # an error in the first scene, none in the second
            boxes = boxes._replace(center=boxes.center + 3.0)
        scenes[token], poses[token] = FrameObjects(boxes, nothing), data.ego_pose(i)
    before = {path: path.stat().st_mtime_ns for path in hand_root.rglob("*")}
    nusc = load_tables(hand_root, "v1.0-hand")

    def score(split, scene):
        part = {token: value for token, value in scenes.items() if token.startswith(scene)}
        return evaluate_boxes(part, poses, hand_root, "v1.0-hand", split, nusc=nusc).as_dict()

    for names, split, scene in ((["hand-1"], "hand_second", "s1"), (["hand-1", "hand-0"], "hand_val", "s")):
        listed = tmp_path / "listed.txt"
        listed.write_text("\n".join(names))
        assert score(listed, scene) == score(str(listed), scene) == score(split, scene)
    (tmp_path / "listed.txt").write_text("hand-0")
    first = score(tmp_path / "listed.txt", "s0")
    assert first["samples"] == 3 and first["class_ap"]["car"] < score("hand_second", "s1")["class_ap"]["car"]
    with pytest.raises(DataError, match=r"outside split .*listed\.txt, s1-0"):
        score(tmp_path / "listed.txt", "s")
    assert {path: path.stat().st_mtime_ns for path in hand_root.rglob("*")} == before
    assert nusc.dataroot == str(hand_root)


def test_leakage_known_by_hand(positions_root):
    keyframes = read_keyframes(load_tables(positions_root, "v1.0-positions"))
    result = measure_leakage(keyframes, ["train-a", "train-b"], ["val-a", "val-b"])
    assert result.nearest == pytest.approx([5, 12, 60, 61, np.hypot(1000, 1000), 3], abs=1e-9)
    record = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert record["distances_m"] == [5, 20, 60] and record["shared_scenes"] == 0
    north, port = record["locations"][NORTH], record["locations"][PORT]
    assert (north["train_frames"], north["val_frames"]) == (2, 4)
    assert north["share_within_m"] == pytest.approx({"5": 1 / 4, "20": 2 / 4, "60": 3 / 4})
    assert (port["train_frames"], port["val_frames"]) == (1, 2)
    assert port["share_within_m"] == pytest.approx({"5": 1 / 2, "20": 1 / 2, "60": 1 / 2})
    assert record["all"]["share_within_m"] == pytest.approx({"5": 2 / 6, "20": 3 / 6, "60": 4 / 6})
    table = result.table()
    assert table.splitlines()[-1].split() == ["all", "3", "6", "33.3%", "50.0%", "66.7%"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_leakage_of_a_split_with_itself_and_with_another_map(positions_root):
    keyframes = read_keyframes(load_tables(positions_root, "v1.0-positions"))
    same = measure_leakage(keyframes, ["val-a", "train-b"], ["val-a"])
    assert same.share(0.0) == 1.0 and same.shared_scenes == 1
    other = measure_leakage(keyframes, ["train-a"], ["train-b"], [1e9])
    assert np.isinf(other.nearest).all() and other.share(1e9) == 0.0
    assert other.as_dict()["locations"][NORTH]["share_within_m"] == {"1e+09": None}  # no validation on this map


def test_a_sample_without_a_position_is_an_error(positions_root):
    nusc = load_tables(positions_root, "v1.0-positions")
    nusc.ego_pose[0]["translation"] = [float("nan"), 0, 0]
    with pytest.raises(DataError, match="sample train-a-0 has no LIDAR_TOP keyframe with an ego_pose"):
        read_keyframes(nusc)
    nusc.ego_pose[0]["translation"] = [1e12, 0, 0]
    with pytest.raises(DataError, match=r"finite translation, at most 1e\+08 m"):
        read_keyframes(nusc)
    nusc.ego_pose[0]["translation"] = [0, 0, 0]
    nusc.sample[0]["scene_token"] = "gone"
    with pytest.raises(DataError, match=r"sample train-a-0 has a scene_token that scene\.json lacks"):
        read_keyframes(nusc)
    nusc.scene.clear()
    with pytest.raises(DataError, match="has no scene; give the version"):
        read_keyframes(nusc)
    nusc = load_tables(positions_root, "v1.0-positions")
    nusc.sample.pop()
    nusc.sample.pop()
    with pytest.raises(DataError, match="no sample of scene val-b"):
        read_keyframes(nusc)


def test_scenes_within_a_distance_match_all_pairs():
    rng = np.random.default_rng(3)
    scene = np.repeat(np.arange(30), 8)
    starts = rng.uniform(0, 600, (30, 2))
    xy = starts[scene] + rng.uniform(-60, 60, (len(scene), 2))
    names = tuple(f"s{k}" for k in range(30))
    keyframes = Keyframes(xy, scene, names, tuple(rng.choice([NORTH, PORT], 30)))
    expected = [[a == b or shortest(keyframes, [a], [b]) <= 40 for a in names] for b in names]
    near = scenes_within(keyframes, 40)
    assert (near == np.array(expected)).all() and 30 < near.sum() < 600
    # "Within" includes equality, as in leakage.
    assert scenes_within(line_of_scenes([0, 60, 121]), 60).sum() == 3 + 2


def test_geographic_split_never_divides_a_connected_group():
    # At 60 m: {0, 50, 100} are connected through 50, {300, 350}, {600}, {900}, {1000}: five groups.
    keyframes = line_of_scenes([0, 50, 100, 300, 350, 600, 900, 1000], length=2)
    found = set()
    for seed in range(20):
        made = geographic_split(keyframes, min_distance=60, seed=seed, val_share=0.25)
        assert made == geographic_split(keyframes, min_distance=60, seed=seed, val_share=0.25)
        assert sorted(made.train + made.val) == sorted(keyframes.scene_name) and made.left_out == []
        assert made.groups == 5
        assert len(made.val) == 2  # 4 of 16 keyframes: one pair or two single scenes
        assert shortest(keyframes, made.train, made.val) > 60
        assert measure_leakage(keyframes, made.train, made.val).share(60) == 0.0
        found.add(tuple(made.val))
    # Possible validation sets: s3 + s4, or two of s5, s6, s7.
    assert found <= {("s3", "s4"), ("s5", "s6"), ("s5", "s7"), ("s6", "s7")} and len(found) > 1


def test_each_location_contributes_its_share_and_others_make_up_for_missing_ones():
    sparse = concatenated(
        line_of_scenes(range(0, 2000, 100), NORTH), line_of_scenes(range(0, 1000, 100), PORT, start=20)
    )  # 20 and 10 unconnected scenes: a fifth of each is 4 and 2
    made = geographic_split(sparse, min_distance=60, seed=0, val_share=0.2)
    assert sum(int(name[1:]) < 20 for name in made.val) == 4 and len(made.val) == 6
    # Four connected scenes cannot contribute one of them, so the eight others contribute three instead of two.
    dense = concatenated(line_of_scenes([0, 10, 20, 30], NORTH), line_of_scenes(range(0, 800, 100), PORT, start=4))
    made = geographic_split(dense, min_distance=60, seed=0, val_share=0.25)
    assert len(made.val) == 3 and all(int(name[1:]) >= 4 for name in made.val)
    # Groups of two and three scenes: 0.15 x 5 scenes is nearer to none than to two, but validation must not be empty.
    two = line_of_scenes([0, 10, 500, 510, 520])
    assert geographic_split(two, min_distance=60, seed=0).val == ["s0", "s1"]
    assert geographic_split(two, min_distance=60, seed=0, val_share=0.85).train == ["s0", "s1"]
    # A location that cannot be divided is taken whole; the seed selects which one.
    whole = concatenated(*(line_of_scenes([0, 10], location, start=2 * k) for k, location in enumerate("abcd")))
    made = {tuple(geographic_split(whole, min_distance=60, seed=seed, val_share=0.25).val) for seed in range(20)}
    assert len(made) > 1 and all(len(val) == 2 and int(val[0][1:]) % 2 == 0 for val in made)


def test_scenes_are_left_out_where_all_scenes_are_connected():
    chain = line_of_scenes(range(0, 500, 50))  # ten scenes, each connected to its neighbours only
    with pytest.raises(DataError, match="all 10 scenes are connected at 60 m"):
        geographic_split(chain, min_distance=60, seed=0, val_share=0.2)
    # Validation at an end of the chain needs one scene left out, in the middle two.
    made = geographic_split(chain, min_distance=60, seed=0, val_share=0.2, max_left_out=0.1)
    assert (made.val, made.left_out) in ((["s0", "s1"], ["s2"]), (["s8", "s9"], ["s7"]))
    assert len(made.train) == 7 and shortest(chain, made.train, made.val) > 60
    with pytest.raises(DataError, match="are connected"):  # less than one scene is none
        geographic_split(chain, min_distance=60, seed=0, val_share=0.2, max_left_out=0.09)
    # On a ring of ten scenes 50 m apart every arc needs two: the chord of a tenth is 50 m, that of a fifth 95 m.
    turn = 2 * np.pi * np.arange(10) / 10
    xy = 25 / np.sin(np.pi / 10) * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    ring = chain._replace(xy=xy)
    with pytest.raises(DataError, match="are connected"):
        geographic_split(ring, min_distance=60, seed=0, val_share=0.2, max_left_out=0.1)
    made = geographic_split(ring, min_distance=60, seed=0, val_share=0.2, max_left_out=0.2)
    assert [len(part) for part in made[:3]] == [6, 2, 2] and shortest(ring, made.train, made.val) > 60


def test_left_out_scenes_keep_their_limit_in_a_dense_town():
    rng = np.random.default_rng(5)
    scene = np.repeat(np.arange(60), 4)
    xy = rng.uniform(0, 350, (60, 2))[scene] + rng.uniform(-5, 5, (240, 2))
    town = Keyframes(xy, scene, tuple(f"s{k}" for k in range(60)), (NORTH,) * 60)
    for seed in range(5):
        made = geographic_split(town, min_distance=60, seed=seed, val_share=0.2, max_left_out=0.2)
        assert 0 < len(made.left_out) <= 12 and len(made.val) >= 6
        assert len({*made.train, *made.val, *made.left_out}) == 60
        assert shortest(town, made.train, made.val) > 60


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_distance": -1.0}, "min_distance is -1.0"),
        ({"min_distance": float("nan")}, "min_distance is nan"),
        ({"val_share": 0.0}, "val_share is 0.0"),
        ({"max_left_out": 1.0}, "max_left_out is 1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    with pytest.raises(ConfigError, match=message):
        geographic_split(line_of_scenes([0, 100]), **({"min_distance": 60, "seed": 0} | wrong))


def test_the_picture_marks_leaking_keyframes(tmp_path):
    keyframes = line_of_scenes([0, 3, 900, 2000])

    def count(val, colour):
        draw_leakage(measure_leakage(keyframes, ["s0"], val), tmp_path / "map.png", "title")
        picture = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
        return int((abs(picture - colour).max(-1) < 12).sum())

    red, blue = (204, 20, 26), (31, 102, 217)  # within 5 m; farther than all distances
    legend_red, legend_blue = count([], red), count([], blue)
    assert count(["s1"], red) > legend_red and count(["s1"], blue) == legend_blue
    assert count(["s2"], red) == legend_red and count(["s2"], blue) > legend_blue


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def test_the_script_measures(positions_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "val.json").write_text('["val-a", "val-b"]')
    common = ["leakage", "--dataroot", positions_root, "--version", "v1.0-positions", "--train", "far_train"]
    outputs = ["--json", tmp_path / "out" / "a.json", "--out", tmp_path / "out" / "a.png"]
    assert call(monkeypatch, *common, "--val", tmp_path / "val.json", *outputs) == 0
    printed = capsys.readouterr().out
    assert "all                              3       6     33.3%     50.0%     66.7%" in printed
    assert "2 in train, 2 in val, 0 in both" in printed
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["train"] == "far_train" and record["all"]["share_within_m"]["20"] == 0.5
    assert Image.open(tmp_path / "out" / "a.png").format == "PNG"
    assert call(monkeypatch, *common, "--val", "far_away") == 2
    assert 'has no split "far_away"' in capsys.readouterr().err
    assert call(monkeypatch, *common, "--val", "far_val", "--out", tmp_path / "a.pdf") == 2
    assert "ends in .png" in capsys.readouterr().err


def test_the_script_divides(tmp_path, monkeypatch, capsys):
    xs = {f"scene-{k}": (NORTH, [(x, 0), (x, 5)]) for k, x in enumerate([0, 40, 200, 400, 600, 800])}
    write_tables(tmp_path / "root", xs, {"everything": list(xs)})
    common = ["split", "--dataroot", tmp_path / "root", "--version", "v1.0-positions", "--seed", 4]
    out = tmp_path / "far"
    out.mkdir()
    (out / "left_out.txt").write_text("of an earlier split\n")
    assert call(monkeypatch, *common, "--min-distance", 60, "--out", out, "--json", out / "made.json") == 0
    printed = capsys.readouterr().out
    assert "5 connected groups of scenes at 60 m" in printed
    assert printed.splitlines()[-1].split() == ["all", "10", "2", "0.0%", "0.0%", "0.0%"]
    train, val = read_split_file(out / "train.txt"), read_split_file(out / "val.txt")
    assert len(val) == 1 and sorted(train + val) == sorted(xs) and not (out / "left_out.txt").exists()
    made = json.loads((out / "made.json").read_text())
    assert made["val"] == {"scenes": 1, "frames": 2} and made["leakage"]["all"]["share_within_m"]["60"] == 0.0
    assert call(monkeypatch, *common, "--min-distance", 500, "--out", tmp_path / "none") == 2
    assert "are connected at 500 m" in capsys.readouterr().err and not (tmp_path / "none").exists()
