"""Submissions: files written by hand score what they must, ours what the scenes score, mistakes get a sentence."""

import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from perception.data.loader import pad_boxes, pad_lines
from perception.data.nuscenes import NuScenesDataset
from perception.errors import DataError
from perception.evaluation.dataset import evaluate_predictions, save_submissions
from perception.evaluation.lanes import evaluate_lanes
from perception.evaluation.submission import check_samples, read_submission, write_lanes
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import save_checkpoint
from perception.types import LINE_CLASSES, FrameObjects, MapLine, map_tensors

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "evaluate.py"
VERSION, SPLIT = "v1.0-hand", "hand_val"
META = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}


def evaluate(*arguments) -> int:
    """Runs the script in this process; its exit code."""
    before, sys.argv = sys.argv, [str(SCRIPT), *map(str, arguments)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


def dataset_of(root) -> list[str]:
    return ["--dataroot", str(root), "--version", VERSION, "--split", SPLIT]


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def tokens_of(root) -> list[str]:
    return [sample["token"] for sample in json.loads((root / VERSION / "sample.json").read_text())]


def lane_file(root, divider=0.3, boundary=0.7) -> dict:
    """The straight road of the hand-written dataset, each line shifted to the left by what is given, metres.

    The LiDAR sits 0.9 m ahead of the ego's origin. The patch around it ends 30 m ahead and behind, and 0.2 m earlier
    for boundaries.
    """
    lines = [
        {"class": "divider", "score": 0.9, "points": [[-29.1, divider], [30.9, divider]]},
        {"class": "boundary", "score": 0.8, "points": [[-28.9, 4 + boundary], [30.7, 4 + boundary]]},
        {"class": "boundary", "score": 0.7, "points": [[-28.9, -4 + boundary], [30.7, -4 + boundary]]},
    ]
    return {"meta": META, "frame": "ego", "results": {token: lines for token in tokens_of(root)}}


def box_file(root) -> dict:
    """Every car of the hand-written dataset where it is, with its velocity; without its other objects."""
    tables = {
        name: json.loads((root / VERSION / f"{name}.json").read_text()) for name in ("sample", "sample_annotation")
    }
    results = {sample["token"]: [] for sample in tables["sample"]}
    heading = np.array([np.cos(np.radians(30)), np.sin(np.radians(30))])
    for row in tables["sample_annotation"]:
        if row["num_lidar_pts"] == 9:  # the car
            box = {field: row[field] for field in ("sample_token", "translation", "size", "rotation")}
            box |= {"velocity": (4 * heading).tolist(), "detection_name": "car", "detection_score": 1}
            results[row["sample_token"]].append(box | {"attribute_name": "vehicle.moving"})
    return {"meta": META, "results": results}


def test_lanes_written_by_hand(hand_root, tmp_path, capsys):
    path = write(tmp_path / "mine.json", lane_file(hand_root))
    arguments = ["--submission", path, *dataset_of(hand_root), "--json", tmp_path / "numbers.json"]
    assert evaluate(*arguments) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    # Dividers are 0.3 m off: a hit at 0.5, 1.0 and 1.5 m. Boundaries are 0.7 m off: not at 0.5 m. There is no crossing.
    assert numbers["lanes"]["class_ap"] == pytest.approx({"divider": 1, "ped_crossing": 0, "boundary": 2 / 3})
    assert numbers["lane_mAP"] == pytest.approx((1 + 2 / 3) / 3)
    # At 0.2, 0.5 and 1.0 m dividers are hits twice and boundaries once.
    assert numbers["lane_mAP_strict"] == pytest.approx((2 / 3 + 1 / 3) / 3)
    working = numbers["lanes"]["operating_points"]
    assert working["divider"]["error"] == pytest.approx(0.3) and working["boundary"]["error"] == pytest.approx(0.7)
    assert working["divider"]["false_metres_per_frame"] == 0 and working["boundary"]["recall"] == 1
    said = capsys.readouterr().out
    assert "protocol maptr, range 60x30, thresholds 0.5, 1, 1.5 m" in said and "lane_mAP 0.556" in said
    # Working from 0.75 on leaves one of two boundaries; at 0.5 m it is false, 59.6 m long.
    assert evaluate(*arguments, "--score-threshold", 0.75) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["lanes"]["operating_points"]["boundary"]["recall"] == pytest.approx(1 / 2)
    assert numbers["strict_lanes"]["operating_points"]["boundary"]["false_metres_per_frame"] == pytest.approx(59.6)


def test_boxes_written_by_hand(hand_root, tmp_path, capsys):
    path = write(tmp_path / "mine.json", box_file(hand_root))
    assert evaluate("--submission", path, *dataset_of(hand_root), "--json", tmp_path / "numbers.json") == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    # Cars are all found, the nine other classes have no true box that counts and score 0.
    assert numbers["mAP"] == pytest.approx(0.1) and numbers["samples"] == len(tokens_of(hand_root))
    errors = numbers["detection"]["class_errors"]["car"]
    assert all(value == pytest.approx(0, abs=1e-3) for value in errors.values()), errors
    assert "mAP 0.100" in capsys.readouterr().out
    names = ["hand-1"]
    part = box_file(hand_root)
    part["results"] = {token: boxes for token, boxes in part["results"].items() if token.startswith("s1")}
    write(path, part)
    split = write(tmp_path / "second.json", names)
    common = ["--dataroot", hand_root, "--version", VERSION, "--split", split]
    assert evaluate("--submission", path, *common, "--json", tmp_path / "numbers.json") == 0
    assert json.loads((tmp_path / "numbers.json").read_text())["samples"] == 3


@pytest.fixture(scope="module")
def dataset(hand_root) -> NuScenesDataset:
    return NuScenesDataset(hand_root, VERSION, SPLIT, image_size=(64, 96))


def guesses(dataset) -> dict[str, FrameObjects]:
    """The ground truth with noise and with scores, in float32 like the output of a network."""
    scenes, random = {}, torch.Generator().manual_seed(3)
    for i, token in enumerate(dataset.tokens):
        gt = FrameObjects(pad_boxes([dataset.gt_boxes(i)]), pad_lines([dataset.gt_lines(i)], 20))
        boxes, lines, _ = map_tensors(lambda tensor: tensor[0], gt)

        def noise(tensor, size):
            return tensor + size * torch.randn(tensor.shape, generator=random)

        scenes[token] = FrameObjects(
            boxes._replace(
                center=noise(boxes.center, 0.4),
                yaw=noise(boxes.yaw, 0.2),
                velocity=noise(boxes.velocity, 0.3),
                score=torch.rand(boxes.score.shape, generator=random),
            ),
            lines._replace(
                points=noise(lines.points, 0.3) + 0.4, score=torch.rand(lines.score.shape, generator=random)
            ),
        )
    return scenes


@pytest.mark.parametrize("protocol", ["maptr", "streammapnet"])
def test_written_submissions_have_the_metrics_of_the_predictions(hand_root, dataset, tmp_path, protocol):
    scenes = guesses(dataset)
    direct = evaluate_predictions(dataset, scenes, protocol=protocol)
    save_submissions(tmp_path, dataset, scenes)
    options = [*dataset_of(hand_root), "--lanes-protocol", protocol, "--json", tmp_path / "numbers.json"]
    assert evaluate("--submission", tmp_path / "lanes.json", *options) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["lanes"] == json.loads(json.dumps(direct.lanes.as_dict()))
    assert numbers["strict_lanes"] == json.loads(json.dumps(direct.strict_lanes.as_dict()))
    assert 0 < numbers["lane_mAP"] < 1 and numbers["lanes"]["protocol"] == protocol
    assert evaluate("--submission", tmp_path / "detection.json", *options) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["detection"] == direct.detection.as_dict()
    assert 0 < numbers["nds"] < 0.2


def test_larger_range_and_other_protocol_change_ground_truth_and_thresholds(hand_root, tmp_path):
    # 100 x 50 m around the ego: the divider reaches from -50 to 50 m, boundaries 0.2 m less. They are 1.2 m off: hits
    # at 1.5 and 2 m.
    content = lane_file(hand_root)
    for lines in content["results"].values():
        for line in lines:
            side = {"divider": 0.0, "boundary": np.sign(line["points"][0][1]) * 4.0}[line["class"]] + 1.2
            end = {"divider": 50.0, "boundary": 49.8}[line["class"]]
            line["points"] = [[-end, side], [end, side]]
    path = write(tmp_path / "far.json", content)
    common = [*dataset_of(hand_root), "--json", tmp_path / "numbers.json", "--range", "100x50"]
    for protocol, thresholds, hits in (("streammapnet", [1.0, 1.5, 2.0], 2), ("maptr", [0.5, 1.0, 1.5], 1)):
        assert evaluate("--submission", path, *common, "--lanes-protocol", protocol) == 0
        lanes = json.loads((tmp_path / "numbers.json").read_text())["lanes"]
        assert (lanes["protocol"], lanes["lane_range"], lanes["thresholds_m"]) == (protocol, "100x50", thresholds)
        assert lanes["class_ap"] == pytest.approx({"divider": hits / 3, "ped_crossing": 0, "boundary": hits / 3})
        assert lanes["operating_points"]["divider"]["bins"][-1]["near"] == 50


@pytest.mark.slow
def test_weights_leave_submissions_and_name_the_protocol(hand_root, tmp_path):
    """The script as people run it: with a config and weights, then on what that left behind."""
    small = dict(image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2)
    small |= dict(box_queries=20, line_queries=8)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "some.safetensors", BEVTransformer(BEVTransformerConfig.preset("nano", **small)), {})
    section = dict(dataroot=str(hand_root), version=VERSION, split=SPLIT)
    train = dict(epochs=1, batch_size=1, lr=1e-3, weight_decay=0.0, warmup_iters=1, grad_clip=1.0, ema_momentum=0.0)
    train |= dict(streams=1, frames_per_clip=1, drop_frames=0.0, image_epochs=0, val_every=1, log_every=1, workers=0)
    config = f"model = dict(preset='nano', **{small!r})\ntrain_data = val_data = {section!r}\ntrain = {train!r}\n"
    (tmp_path / "small.py").write_text(config)
    command = [sys.executable, str(SCRIPT), "small.py", "some.safetensors", "--lanes-protocol", "streammapnet"]
    command += ["--save-submission", "sub", "--json", "direct.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "protocol streammapnet, range 60x30, thresholds 0.5, 1, 1.5 m" in done.stdout
    direct = json.loads((tmp_path / "direct.json").read_text())
    options = [*dataset_of(hand_root), "--lanes-protocol", "streammapnet", "--json", tmp_path / "again.json"]
    assert evaluate("--submission", tmp_path / "sub" / "lanes.json", *options) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["lanes"] == direct["lanes"] and sum(again["lanes"]["prediction_count"].values()) > 0
    assert evaluate("--submission", tmp_path / "sub" / "detection.json", *options) == 0
    assert json.loads((tmp_path / "again.json").read_text())["detection"] == direct["detection"]
    assert json.loads((tmp_path / "sub" / "lanes.json").read_text())["frame"] == "ego"


def test_lines_come_back_with_every_digit(tmp_path):
    rng = np.random.default_rng(0)
    lines = {
        token: [MapLine(k, rng.normal(0, 10, (k + 2, 2)), float(rng.uniform())) for k in range(3)] for token in "ab"
    } | {"c": []}
    write_lanes(tmp_path / "lanes.json", lines)
    submission = read_submission(tmp_path / "lanes.json")
    assert submission.meta == META and submission.results.keys() == lines.keys()
    for token, found in lines.items():
        for line, back in zip(found, submission.results[token], strict=True):
            assert (back.label, back.score) == (line.label, line.score) and (back.points == line.points).all()
    assert evaluate_lanes(submission.results, lines).mean_ap == 1


GOOD_LANES = {
    "meta": META,
    "frame": "ego",
    "results": {"t1": [{"class": "divider", "score": 1, "points": [[0, 0], [1, 2.5]], "id": 7}], "t2": []},
}
GOOD_BOX = {
    "sample_token": "t1", "translation": [1, 2, 3], "size": [1, 2, 3], "rotation": [1, 0, 0, 0],
    "velocity": [float("nan"), 0], "detection_name": "car", "detection_score": 0.5, "attribute_name": "",
}  # fmt: skip
GOOD_BOXES = {"meta": META, "results": {"t1": [GOOD_BOX], "t2": []}}
GONE = object()


def changed(content, path, value):
    """A copy in which the value at a path of keys is another, or is gone."""
    content = copy.deepcopy(content)
    *way, last = path
    place = content
    for key in way:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return content


def test_good_files_are_read(tmp_path):
    lanes = read_submission(write(tmp_path / "lanes.json", GOOD_LANES))
    assert lanes.results["t2"] == [] and lanes.results["t1"][0].label == LINE_CLASSES.index("divider")
    assert lanes.results["t1"][0].points.dtype == np.float64
    boxes = read_submission(write(tmp_path / "boxes.json", GOOD_BOXES))
    assert boxes.results["t1"][0]["detection_name"] == "car"
    extra = changed(GOOD_BOXES, ["results", "t1", 0, "ego_translation"], "what the devkit would read")
    extra = changed(extra, ["results", "t1", 0, "num_pts"], 5)
    assert read_submission(write(tmp_path / "boxes.json", extra)).results["t1"][0].keys() == GOOD_BOX.keys()
    nothing = changed(GOOD_LANES, ["results"], {"t1": []})
    assert read_submission(write(tmp_path / "nothing.json", nothing)).results == {"t1": []}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["meta"], GONE, "field meta is missing"),
        (["meta"], [], "field meta is []"),
        (["results"], GONE, "field results is missing"),
        (["results"], [], "field results is []"),
        (
            ["frame"],
            GONE,
            'field frame is null or missing; give lines in the ego frame (x forward, y left, metres) and write "frame"',
        ),
        (["frame"], "lidar", 'field frame is "lidar"'),
        (["results", "t1"], None, "results.t1 is null or missing; it must be a list, empty if nothing is predicted"),
        (["results", "t1", 0], [], "results.t1[0] is []; it must be an object"),
        (["results", "t1", 0, "class"], GONE, "results.t1[0].class is missing"),
        (["results", "t1", 0, "class"], "lane", 'class is "lane"; it must be one of divider, ped_crossing, boundary'),
        (["results", "t1", 0, "score"], "0.5", 'score is "0.5"; it must be a finite number'),
        (["results", "t1", 0, "score"], True, "score is true; it must be a finite number"),
        (["results", "t1", 0, "score"], float("nan"), "score is NaN; it must be a finite number"),
        (["results", "t1", 0, "points"], [[0, 0]], "points is [[0, 0]]; it must be a list of two or more [x, y]"),
        (["results", "t1", 0, "points"], [[0, 0, 0], [1, 1, 1]], "it must be a list of two or more [x, y]"),
        (["results", "t1", 0, "points"], [[0, 0], [1]], "it must be a list of two or more [x, y]"),
        (["results", "t1", 0, "points"], [["0", 0], [1, 1]], "it must be a list of two or more [x, y]"),
        (["results", "t1", 0, "points"], [[0, 0], [1, float("inf")]], "points holds a number that is not finite"),
        (["results", "t1", 0, "points"], [[600, 1600], [610, 1600]], "1600 m away, which looks like map coordinates"),
    ],
)
def test_a_mistake_in_lanes_names_file_and_field(tmp_path, path, value, said):
    file = write(tmp_path / "mine.json", changed(GOOD_LANES, path, value))
    with pytest.raises(DataError) as error:
        read_submission(file)
    assert str(error.value).startswith(f"{file}: ") and said in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["results", "t1", 0, "sample_token"], "t2", 'sample_token is "t2"; it must be its key, "t1"'),
        (["results", "t1", 0, "translation"], [1, 2], "translation is [1, 2]; it must be a list of 3 numbers"),
        (["results", "t1", 0, "rotation"], [1, 0, 0, None], "rotation is null or missing; it must be a finite number"),
        (
            ["results", "t1", 0, "rotation"],
            [0, 0, 0, 0],
            "rotation is [0, 0, 0, 0]; it must be a quaternion w, x, y, z",
        ),
        (["results", "t1", 0, "size"], [1, 0, 1], "size is [1, 0, 1]; it must be above 0"),
        (["results", "t1", 0, "rotation"], [1e-200, 0, 0, 0], "it must be a quaternion w, x, y, z"),
        (
            ["results", "t1", 0, "translation"],
            [1e30, 0, 0],
            "translation is 1e+30; it must be a finite number, at most",
        ),
        (["results", "t1", 0, "num_pts"], 0, "num_pts is 0, and the devkit leaves such boxes out of the score"),
        (["results", "t1", 0, "num_pts"], "few", 'num_pts is "few"; leave it out, or give -1'),
        (["results", "t1", 0, "velocity"], GONE, "velocity is missing"),
        (["results", "t1", 0, "detection_name"], "van", 'detection_name is "van"; it must be one of car, truck'),
        (["results", "t1", 0, "detection_score"], GONE, "detection_score is missing"),
        (["results", "t1", 0, "attribute_name"], "moving", 'attribute_name is "moving"; it must be one of "", cycle'),
        (["results", "t1"], [GOOD_BOX] * 501, "results.t1 has 501 boxes; keep the 500 best of a sample"),
    ],
)
def test_a_mistake_in_boxes_names_file_and_field(tmp_path, path, value, said):
    file = write(tmp_path / "mine.json", changed(GOOD_BOXES, path, value))
    with pytest.raises(DataError) as error:
        read_submission(file)
    assert str(error.value).startswith(f"{file}: ") and said in str(error.value)


def test_files_that_are_no_submission(tmp_path):
    for text, said in (
        ("{", "is not valid JSON"),
        ("[]", "the file is []"),
        ('{"meta": {}, "results": {"t1": [], "t1": []}}', "key t1 occurs twice"),
    ):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(DataError, match=r"mine\.json") as error:
            read_submission(tmp_path / "mine.json")
        assert said in str(error.value)
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        read_submission(tmp_path / "none.json")


def test_samples_must_be_those_of_the_split(tmp_path):
    for content in (GOOD_LANES, GOOD_BOXES):
        submission = read_submission(write(tmp_path / "mine.json", content))
        check_samples(submission, ["t1", "t2"])
        with pytest.raises(DataError, match=r"mine\.json: field results lacks 1 of the 3 samples of the split, t3"):
            check_samples(submission, ["t1", "t2", "t3"])
        with pytest.raises(DataError, match=r"mine\.json: field results holds 1 samples that are not in the split, t2"):
            check_samples(submission, ["t1"])


def test_the_script_names_missing_options(hand_root, tmp_path, capsys):
    lanes = write(tmp_path / "lanes.json", GOOD_LANES)
    for arguments, said in (
        (["--submission", lanes], "--dataroot is missing: with --submission give --dataroot, --version and --split"),
        (["--submission", lanes, *dataset_of(hand_root)], "field results lacks 6 of the 6 samples of the split, s0-0"),
        (["config.py", "--submission", lanes], "--submission needs neither config"),
        (["config.py"], "config and checkpoint are missing"),
    ):
        assert evaluate(*arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1
