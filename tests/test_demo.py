"""The scripts that people meet first: demo, predict and doctor, run as they run them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_result import complaints

from perception.cli.predict import shown
from perception.inference.result import from_dict
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import load_model, save_checkpoint
from perception.models.decoding import empty_boxes, empty_lines
from perception.synthetic import VERSION
from perception.types import Ids, LiveObjects, Seen, map_tensors

PROJECT = Path(__file__).resolve().parent.parent
SMALL = BEVTransformerConfig.preset(
    "nano", image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2,
    box_queries=20, line_queries=8,
)  # fmt: skip


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROJECT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "some.safetensors"
    save_checkpoint(path, BEVTransformer(SMALL), {})
    return path


def table(root: Path, name: str) -> list[dict]:
    return json.loads((root / VERSION / f"{name}.json").read_text())


@pytest.mark.slow
def test_demo_writes_pictures_and_numbers(tmp_path, checkpoint):
    arguments = ["--out", tmp_path, "--checkpoint", checkpoint, "--scenes", 2, "--keyframes", 2, "--seed", 4]
    first = run("demo.py", *arguments)
    assert first.returncode == 0, first.stderr
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert {"nds", "mAP", "lane_mAP", "fps"} <= set(numbers) and numbers["fps"] > 0
    assert numbers["seed"] == 4 and numbers["scenes"] == 2 and numbers["checkpoint"] == "some.safetensors"
    assert all(f"{numbers[key]:.3f}" in first.stdout for key in ("nds", "mAP", "lane_mAP", "fps"))
    pictures = [np.asarray(Image.open(tmp_path / f"demo{name}.png")) for name in ("", "_scene0", "_scene1")]
    # The main picture is one of the two, and holds six camera images beside the bird's-eye view.
    assert sum(np.array_equal(pictures[0], other) for other in pictures[1:]) == 1
    assert pictures[0].shape[1] > 3 * 480 and pictures[0].std() > 20
    assert not list(tmp_path.glob("*.tmp"))
    # The same town is used again, and gives the same numbers.
    (root,) = (path for path in tmp_path.iterdir() if path.is_dir())
    written = (root / VERSION / "sample.json").stat().st_mtime_ns
    assert run("demo.py", *arguments).returncode == 0
    again = json.loads((tmp_path / "demo.json").read_text())
    assert (root / VERSION / "sample.json").stat().st_mtime_ns == written
    assert {**again, "fps": 0} == {**numbers, "fps": 0}


def test_predict_fills_the_memory_up_to_the_sample(tmp_path, town_root, checkpoint):
    from perception.data.nuscenes import NuScenesDataset
    from perception.inference.sequence import predict_stream

    token = [row["token"] for row in table(town_root, "sample") if row["next"] == ""][-1]
    out, path = tmp_path / "new" / "sample.png", tmp_path / "sample.json"
    done = run(
        "predict.py", "--dataroot", town_root, "--version", VERSION, "--split", "town_val", "--sample", token,
        "--checkpoint", checkpoint, "--out", out, "--json", path, "--min-score", 0.001, "--precision", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size[0] > 3 * 480
    numbers = json.loads(path.read_text())
    dataset = NuScenesDataset(town_root, VERSION, "town_val", image_size=SMALL.image_size)
    expected = predict_stream(load_model(checkpoint), dataset).objects[token]
    found = from_dict(numbers)
    assert complaints(numbers) == []
    i = dataset.tokens.index(token)
    assert found.info.time_s == dataset.timestamps[i] and found.info.used_memory and found.warnings == ()
    np.testing.assert_array_equal(found.info.global_from_ego, dataset.ego_pose(i))
    assert found.info.weights.name == Path(checkpoint).name
    assert len(numbers["boxes"]) == int((expected.boxes.score >= 0.001).sum()) > 0
    np.testing.assert_allclose([box["score"] for box in numbers["boxes"]], expected.boxes.score, rtol=1e-3)
    np.testing.assert_allclose([line["points"] for line in numbers["lines"]], expected.lines.points, atol=1e-3)


def test_ids_stay_with_their_boxes():
    boxes = map_tensors(lambda x: torch.zeros(3, *x.shape[2:], dtype=x.dtype), empty_boxes(1, "cpu"))
    boxes = boxes._replace(score=torch.tensor([0.9, 0.1, 0.5]), valid=torch.ones(3, dtype=torch.bool))
    lines = map_tensors(lambda x: x[0], empty_lines(1, "cpu"))
    seen, ids = Seen(torch.ones(3), torch.zeros(0, 20, dtype=torch.bool)), Ids(np.array([7, 8, 9]), np.zeros(0, int))
    found = shown(LiveObjects(boxes, lines, seen, (), ids=ids), 0.3, 0.25)
    assert found.ids.boxes.tolist() == [7, 9] and found.boxes.score.tolist() == pytest.approx([0.9, 0.5])
    assert [box["id"] for box in found.to_dict()["boxes"]] == [7, 9]


def test_predict_draws_the_truth_of_an_info_file(tmp_path, real_keyframe, checkpoint):
    done = run(
        "predict.py", "--info", real_keyframe / "sample.json", "--map-vectors", real_keyframe / "map_vectors.json",
        "--checkpoint", checkpoint, "--min-score", 1, "--out", tmp_path / "real.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    boxes, lines = (row.split() for row in done.stdout.splitlines()[1:3])
    assert boxes == ["boxes", "0", "65", "0"]  # the number of boxes the file calls valid
    assert lines[:2] == ["lines", "0"] and int(lines[2]) > 3 and lines[3] == "0"
    # Nothing is predicted, so what is bright in the bird's-eye view is truth: boxes, lines, and a few words.
    picture = np.asarray(Image.open(tmp_path / "real.png"))
    bev = picture[60:, picture.shape[1] * 3 // 4 :]
    assert (bev.min(-1) > 180).sum() > 2000


def test_predict_says_how_much_is_right_and_what_the_weights_know(tmp_path, town_root, real_keyframe):
    info, path = real_keyframe / "sample.json", tmp_path / "a.json"
    options = "--precision", "float32"  # of which the counts below are
    done = run("predict.py", "--info", info, "--out", tmp_path / "a.png", "--json", path, *options)
    assert done.returncode == 0, done.stderr
    # Looks like success, if nobody counts what is right.
    assert done.stdout.splitlines()[1].split() == ["boxes", "57", "65", "4"]
    assert "\nweights: trained on generated scenes only (380 scenes, 6 cameras, " in done.stdout
    assert "\nnote: the weights were trained on generated scenes only and are of no use on real images" in done.stdout
    numbers = json.loads(path.read_text())
    assert len(numbers["boxes"]) == 57 and all(0.25 <= box["seen"] <= 1 for box in numbers["boxes"])
    assert len(numbers["warnings"]) == 1 and not numbers["memory"]["used"] and numbers["weights"]["name"] == "nano"
    assert numbers["time_s"] is None and len(numbers["lines"][0]["seen"]) == len(numbers["lines"][0]["points"])
    done = run(
        "predict.py", "--dataroot", town_root, "--version", VERSION, "--split", "town_val", "--out", tmp_path / "b.png"
    )
    predicted, gt, matched = map(int, done.stdout.splitlines()[1].split()[1:])
    assert matched > 0.4 * max(predicted, gt) > 4 and "note:" not in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataroot", "ROOT", "--out", "OUT.png"], "--version is missing"),
        (["--dataroot", "ROOT", "--version", VERSION, "--split", "town_val", "--sample", "x", "--out", "OUT.png"],
         "no sample x"),
        (["--info", "nowhere.json", "--out", "OUT.png"], "nowhere.json is missing"),
    ],
)  # fmt: skip
def test_predict_says_in_one_sentence_what_is_wrong(tmp_path, town_root, checkpoint, arguments, message):
    places = {"ROOT": str(town_root), "OUT.png": str(tmp_path / "out.png")}
    arguments = [places.get(argument, argument) for argument in arguments]
    done = run("predict.py", "--checkpoint", checkpoint, *arguments)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_doctor_tells_versions_and_agrees_with_its_exit_code():
    done = run("doctor.py")
    rows = {line[:20].strip(): line[52:].strip() for line in done.stdout.splitlines()}
    assert done.stdout.splitlines()[0].split()[1] == sys.version.split()[0]
    assert torch.__version__.partition("+")[0] in done.stdout
    assert rows["import perception"] == "ok" and {"torch", "mmdet3d", "devices", "shipped weights"} <= set(rows)
    assert done.returncode == (0 if set(rows.values()) == {"ok"} else 2), done.stdout
