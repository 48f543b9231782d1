"""Tables are read in blocks: the same records as `json` reads, the same findings, an index of the same digits."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest

from perception.data import sample_lines, table_files, tables
from perception.data.checked_tables import check_tables
from perception.data.index import load_index
from perception.data.lane_map import LANE_PROTOCOLS, LaneMap
from perception.data.table_files import TABLES, divided, read_blocks, read_table, read_tables
from perception.data.tables import DETECTION_CLASS, READERS, Table, as_they_are, own_keys
from perception.errors import DataError
from perception.geometry import invert_rigid, rigid_from_quaternion, yaw_from_rotation
from perception.types import ATTRIBUTES, BOX_CLASSES, DEFAULT_LANE_RANGE, LaneRange

VERSION, SPLIT, CAMERAS = "v1.0-hand", "hand_val", ("CAM_FRONT", "CAM_BACK")

ROWS = [
    {"token": "a", "text": 'ends like a record"},{"token": "no', "list": [{"x": 1}, {"y": 2}]},
    {"token": "b", "text": "},", "number": 1e-300, "other": None},
    {"token": "ü😀", "text": "}\n,{", "nested": {"deep": [[], {}, {"a": {}}]}},
    {"token": "\ud800", "text": "half of a pair"},
    *({"token": f"row {k}", "text": "x" * (k % 50)} for k in range(60)),
]
FORMATS = {
    "one line": {},
    "a key a line, as nuScenes": {"indent": 0},
    "indented": {"indent": 4},
    "compact": {"separators": (",", ":")},
    "spaces before commas": {"separators": (" , ", " : ")},
    "letters as they are": {"ensure_ascii": False},
}


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("style", FORMATS)
def test_blocks_hold_the_records_of_any_json(tmp_path, monkeypatch, style, size):
    monkeypatch.setattr(table_files, "BLOCK", size)
    path = tmp_path / "table.json"
    content = json.dumps(ROWS, **FORMATS[style]).encode(errors="surrogatepass")
    for start, end in ((b"", b""), (b"\xef\xbb\xbf \n", b" \n\n")):
        path.write_bytes(start + content + end)
        assert read_table(path) == ROWS
        table = Table(path, {"token": own_keys, "text": as_they_are})
        assert [table.record(row) for row in (5, 0, 63, 1, 2, 3)] == [ROWS[row] for row in (5, 0, 63, 1, 2, 3)]
        assert table.rows == 64 and table.columns["text"] == [row["text"] for row in ROWS]
        assert table.columns["token"].tolist() == [hash(row["token"]) if k != 3 else -1 for k, row in enumerate(ROWS)]
    path.write_text(" [ ]\n")
    assert list(read_blocks(path)) == []


@pytest.fixture
def parent_reads(monkeypatch):
    """Divides small tables among processes; collects the spans that this process reads itself."""
    monkeypatch.setattr(tables, "SPAN", 600)
    monkeypatch.setattr(tables, "processors", lambda: 2)
    spans = []

    def read(path, span=None):
        spans.append(span)
        return read_blocks(path, span)

    monkeypatch.setattr(tables, "read_blocks", read)
    return spans


READERS_OF_ROWS = {"token": own_keys, "text": as_they_are, "number": as_they_are}


@pytest.mark.parametrize("style", ["one line", "a key a line, as nuScenes", "letters as they are"])
def test_processes_read_the_columns_of_a_table(tmp_path, parent_reads, style):
    """Text that looks like the end of a record does not mislead them."""
    path = tmp_path / "table.json"
    for rows in (ROWS[4:], ROWS, ROWS[4:40] + ROWS[:2] * 30 + ROWS[4:]):
        path.write_bytes(json.dumps(rows, **FORMATS[style]).encode(errors="surrogatepass"))
        spans = divided(path, 600)
        assert len(spans) > 3 and spans[-1].stop is None
        assert all(one.start < one.stop < two.start for one, two in pairwise(spans))
        table = Table(path, READERS_OF_ROWS)
        assert table.columns["text"] == [row["text"] for row in rows] and table.rows == len(rows)
        alone = Table(path, READERS_OF_ROWS, rows)
        assert np.array_equal(table.columns["token"], alone.columns["token"])
        assert table.columns["number"] == alone.columns["number"] and table.present == alone.present
        assert all(table.record(row) == rows[row] for row in range(0, len(rows), 7))
        if rows == ROWS[4:]:
            assert not parent_reads  # nothing was read twice


def test_a_record_in_a_text_is_no_record(tmp_path, parent_reads):
    """The text of one record holds many that look right: nothing of them may be read."""
    rows = [{"token": "a", "text": '"},{"token": "b", "text": "c"},{"token": "d", "text": "' * 40}, *ROWS[4:]]
    rows += [{"token": f"last {k}", "text": "},\n{"} for k in range(40)]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(rows, ensure_ascii=False))
    table = Table(path, READERS_OF_ROWS)
    assert table.columns["text"] == [row["text"] for row in rows] and parent_reads


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text[:-1] + ",]",
        lambda text: text.replace('"row 30"', '"row" 30'),
        lambda text: text.replace('\n{\n"token": "row 30"', '\n7,{\n"token": "row 30"'),
        lambda text: text.replace('\n{\n"token": "row 30"', '\n,{\n"token": "row 30"'),
    ],
)
def test_processes_name_malformed_json_as_one_does(tmp_path, parent_reads, damage):
    path = tmp_path / "table.json"
    path.write_text(damage(json.dumps(ROWS[4:], indent=0)))
    with pytest.raises(DataError, match="is not") as alone:
        read_table(path)
    with pytest.raises(DataError, match="is not") as caught:
        Table(path, READERS_OF_ROWS)
    assert str(caught.value) == str(alone.value) and parent_reads


@pytest.mark.parametrize("size", [1, 50, 1 << 20])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-1], r"is not valid JSON \(Expecting .* in line \d+, at byte \d+\)"),
        (lambda text: text[: len(text) // 2], r"is not valid JSON"),
        (lambda text: text + "x", r"is not valid JSON \(Extra data in line"),
        (lambda text: text[:-1] + ",]", r"is not valid JSON \(Expecting value"),
        (
            lambda text: text.replace('"row 30"', '"row" 30'),
            r"is not valid JSON \(Expecting ',' delimiter in line 123,",
        ),
        (lambda text: text.replace('{\n"token": "row 30"', '{\n"token" "row 30"'), r"is not valid JSON"),
        (lambda text: text.replace('\n{\n"token": "row 30"', '\n7,{\n"token": "row 30"'), r"is not a list of objects"),
        (lambda text: '{"a": 1}', r"is not a list of objects"),
        (lambda text: "[" * 100_000, r"is not valid JSON"),
        (lambda text: "version https://git-lfs.github.com/spec/v1", r"a pointer of Git LFS"),
    ],
)
def test_malformed_json_is_named_wherever_it_is(tmp_path, monkeypatch, damage, message, size):
    monkeypatch.setattr(table_files, "BLOCK", size)
    monkeypatch.setattr(table_files, "LONGEST_RECORD", 4000)
    path = tmp_path / "table.json"
    path.write_text(damage(json.dumps(ROWS[4:], indent=0)))
    with pytest.raises(DataError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "table.json"
    for content in (b'[{"token": "\xff"}]', '[{"token": "a"}]'.encode("utf-16")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is not valid JSON .*codec can't decode"):
            read_table(path)


def test_a_table_that_changes_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(ROWS))
    table = Table(path, {"token": own_keys})
    path.write_text("[")
    with pytest.raises(DataError, match="changed while it was read"):
        table.record(0)


def test_findings_do_not_depend_on_the_blocks(hand_root, tmp_path, monkeypatch):
    """Also when the tables are in memory, as for the devkit."""
    root = shutil.copytree(hand_root, tmp_path / "root")
    path = root / VERSION / "sample_data.json"
    rows = json.loads(path.read_text())
    rows[3].update(filename="../x", timestamp="now", is_key_frame=None)
    rows[-1].update(token=rows[0]["token"], ego_pose_token=7)
    del rows[5]["sample_token"]
    path.write_text(json.dumps(rows))
    want = check_tables(root, VERSION)
    assert len(want) > 5
    assert check_tables(root, VERSION, read_tables(root / VERSION)) == want
    monkeypatch.setattr(table_files, "BLOCK", 300)
    assert check_tables(root, VERSION) == want


def test_processes_build_the_same_index(town_root, tmp_path, monkeypatch):
    (version,) = [path.parent.name for path in town_root.glob("*/sample.json")]
    splits = json.loads((town_root / version / "splits.json").read_text())
    (split,) = [name for name, scenes in splits.items() if scenes]
    stored = []
    for many in (1 << 30, 1):
        monkeypatch.setattr(tables, "SPAN", many if many > 1 else 20_000)
        monkeypatch.setattr(sample_lines, "MANY_SCENES", many)
        for module in (tables, sample_lines):
            monkeypatch.setattr(module, "processors", lambda: 3)
        load_index(town_root, version, split, CAMERAS, DEFAULT_LANE_RANGE, tmp_path / str(many))
        (path,) = (tmp_path / str(many)).glob("index-*.bin")
        stored.append(path.read_bytes())
    assert stored[0] == stored[1]


def test_classes_of_categories_are_those_of_the_devkit():
    from nuscenes.eval.detection.utils import category_to_detection_name
    from nuscenes.utils.color_map import get_colormap

    names = [*get_colormap(), *DETECTION_CLASS, "unknown"]
    assert {name: category_to_detection_name(name) for name in names} == {n: DETECTION_CLASS.get(n) for n in names}


def one_by_one(nusc, samples):
    """Fields of an index from the devkit's records, each by the formulas for one record: the twin of the fast path."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    def pose(record):
        return rigid_from_quaternion(record["rotation"], record["translation"])

    found = {name: [] for name in ("global_from_ego", "ego_from_cam", "center", "yaw", "velocity", "attribute")}
    for token in samples:
        record = nusc.get("sample", token)
        files = {channel: nusc.get("sample_data", data) for channel, data in record["data"].items()}
        poses = {channel: pose(nusc.get("ego_pose", file["ego_pose_token"])) for channel, file in files.items()}
        global_from_ego = poses["LIDAR_TOP"]
        found["global_from_ego"].append(global_from_ego)
        for channel in CAMERAS:
            mount = pose(nusc.get("calibrated_sensor", files[channel]["calibrated_sensor_token"]))
            found["ego_from_cam"].append(invert_rigid(global_from_ego) @ poses[channel] @ mount)
        ego_from_global = invert_rigid(global_from_ego)
        for box in (nusc.get("sample_annotation", box) for box in record["anns"]):
            if category_to_detection_name(box["category_name"]) is None:
                continue
            ego_from_box = ego_from_global @ pose(box)
            found["center"].append(ego_from_box[:3, 3].astype(np.float32))
            found["yaw"].append(np.float32(yaw_from_rotation(ego_from_box)))
            velocity = ego_from_global[:3, :3] @ nusc.box_velocity(box["token"])
            found["velocity"].append(velocity[:2].astype(np.float32))
            names = [nusc.get("attribute", attribute)["name"] for attribute in box["attribute_tokens"]]
            found["attribute"].append(ATTRIBUTES.index(names[0]) if names else -1)
    return {name: np.array(values) for name, values in found.items()}


def test_the_index_has_the_digits_of_single_records(town_root, tmp_path):
    from nuscenes.nuscenes import NuScenes

    (version,) = [path.parent.name for path in town_root.glob("*/sample.json")]
    splits = json.loads((town_root / version / "splits.json").read_text())
    (split,) = [name for name, scenes in splits.items() if scenes]
    index = load_index(town_root, version, split, CAMERAS, DEFAULT_LANE_RANGE, tmp_path)
    nusc = NuScenes(version, str(town_root), verbose=False)
    want = one_by_one(nusc, [token.decode() for token in index.token])
    assert np.array_equal(index.global_from_ego, want["global_from_ego"])
    assert np.array_equal(index.ego_from_cam.reshape(-1, 4, 4), want["ego_from_cam"])
    assert np.array_equal(index.box_center, want["center"]) and np.array_equal(index.box_yaw, want["yaw"])
    assert np.array_equal(index.box_velocity, want["velocity"], equal_nan=True)
    assert np.isfinite(index.box_velocity).any() and np.array_equal(index.box_attribute, want["attribute"])
    assert set(index.box_label) <= set(range(len(BOX_CLASSES)))


@pytest.mark.parametrize("protocol", LANE_PROTOCOLS)
def test_lines_of_many_patches_are_those_of_each(town_root, protocol):
    rng = np.random.default_rng(0)
    lane_map = LaneMap(max((town_root / "maps" / "expansion").glob("*.json"), key=lambda path: path.stat().st_size))
    content = json.loads(lane_map.path.read_text())
    nodes = np.array([[node["x"], node["y"]] for node in content["node"]])
    centers = np.concatenate([rng.choice(nodes, 20) + rng.normal(0, 10, (20, 2)), [[1e6, 1e6]]])
    yaws = rng.uniform(-np.pi, np.pi, len(centers))
    together = lane_map.lines_of_patches(centers, yaws, LaneRange(80, 40), protocol)
    assert len(together.label) > 50 and together.of_sample(20) == []
    for k, ((x, y), yaw) in enumerate(zip(centers, yaws, strict=True)):
        lines = together.of_sample(k)
        alone = lane_map.lines(x, y, float(yaw), LaneRange(80, 40), protocol)
        assert [line.label for line in lines] == [line.label for line in alone]
        assert all(np.array_equal(a.points, b.points) for a, b in zip(lines, alone, strict=True))


def test_every_field_that_is_checked_has_a_reader():
    assert set(READERS) == set(TABLES) and all("token" in readers for readers in READERS.values())


@pytest.mark.slow
def test_tables_of_the_size_of_trainval_need_little_memory(tmp_path):
    """An eighth of trainval: the memory that the index of 850 scenes needs must stay below 1 GB."""
    import subprocess
    import sys

    from large_tables import main

    from perception.synthetic import simulate

    simulate(tmp_path / "town", scenes=1, seed=7, keyframes=40, image_size=(16, 32), workers=1)
    main(tmp_path / "town", tmp_path / "large", scenes=106)
    code = (
        "import resource, sys; from pathlib import Path; from perception.data.index import load_index;"
        "from perception.types import DEFAULT_LANE_RANGE; usage = lambda: resource.getrusage(resource.RUSAGE_SELF);"
        "before = usage().ru_maxrss;"
        "index = load_index(Path(sys.argv[1]), 'v1.0-synthetic', 'large', ('CAM_FRONT', 'CAM_BACK'),"
        "DEFAULT_LANE_RANGE, Path(sys.argv[2]));"
        "print(len(index.token), (usage().ru_maxrss - before) / 1e6, usage().ru_utime)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "large"), str(tmp_path / "cache")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    samples, gigabytes, _ = map(float, done.stdout.split())
    assert samples == 106 * 40 and gigabytes < 0.25
