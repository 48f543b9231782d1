"""Results as JSON: the round trip is exact, the schema accepts them, and malformed ones are named."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT

from perception.errors import DataError
from perception.export.runtime import Runtime
from perception.inference.predictor import Predictor
from perception.inference.result import SCHEMA
from perception.models.checkpoint import save_checkpoint
from perception.models.provenance import Provenance, weights_of
from perception.types import ATTRIBUTES, BOX_CLASSES, LINE_CLASSES, Ids, LiveObjects, NumpyLiveObjects

ABOUT = Provenance(("v1.0-synthetic",), 40, 1, ("CAM_FRONT",), (0.6, 0.9), (1.4, 1.7), (0.5, 0.5))


def complaints(record) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema", reason="the JSON Schema is checked with jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(record)]


def assert_equal(found, expected):
    """The same types, dtypes, shapes and bits."""
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(found, torch.Tensor | np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    else:
        assert found == expected


@pytest.fixture(scope="module")
def results(make_live, live_frames):
    """Two steps of the predictor and of the runtime."""
    found = {}
    for kind, make in make_live.items():
        live = make(min_score=0.02)
        found[kind] = [live.step(*frame) for frame in live_frames[:2]]
        assert all(len(result.boxes.score) and len(result.lines.score) for result in found[kind])
    return found


def test_the_round_trip_is_exact(results, live_kind):
    for result, memory in zip(results[live_kind], (False, True), strict=True):
        text = result.to_json()
        assert "\n" not in text
        assert_equal(type(result).from_json(text), result)
        assert_equal(type(result).from_dict(result.to_dict()), result)
        assert not complaints(json.loads(text)) and json.loads(text) == result.to_dict()
        assert result.info.used_memory is memory and bool(result.info.no_memory_because) is not memory


def test_predictor_and_runtime_write_the_same(results):
    """One code for both: the numpy result of a torch result writes the same text."""
    for result in results["predictor"]:
        arrays = NumpyLiveObjects.from_dict(result.to_dict())
        assert arrays.boxes.label.dtype == results["runtime"][0].boxes.label.dtype
        assert arrays.to_json() == result.to_json()


def test_a_record_reads_as_it_is_documented(results, live_frames, small_network):
    result = results["predictor"][1]
    record = result.to_dict()
    assert record["frame"] == "ego" and record["units"] == {
        "length": "m",
        "angle": "rad",
        "time": "s",
        "velocity": "m/s",
    }
    assert record["time_s"] == live_frames[1][3] and record["global_from_ego"] == live_frames[1][2].tolist()
    assert record["memory"] == {"used": True, "reason": ""} and record["weights"] == {"name": None, "trained_on": None}
    box, line = record["boxes"][3], record["lines"][2]
    assert box["class"] == BOX_CLASSES[int(result.boxes.label[3])] and box["yaw"] == float(result.boxes.yaw[3])
    assert box["seen"] == float(result.seen.boxes[3]) and box["attribute"] is None and "id" not in box
    assert (
        line["class"] == LINE_CLASSES[int(result.lines.label[2])] and line["points"] == result.lines.points[2].tolist()
    )
    assert line["seen"] == result.seen.lines[2].tolist()


def test_what_the_weights_were_trained_on_goes_with_the_result(small_network, live_frames, tmp_path):
    path = tmp_path / "town.safetensors"
    save_checkpoint(path, small_network, {}, provenance=ABOUT)
    with pytest.warns(match="expect worse results"):
        weights = Predictor(path).step(*live_frames[0]).to_dict()["weights"]
    assert weights["name"] == "town.safetensors"
    assert Provenance.from_json(json.dumps(weights["trained_on"])) == ABOUT


def test_an_export_carries_what_its_weights_were_trained_on(fp32_export, live_frames, tmp_path):
    assert Runtime(fp32_export).step(*live_frames[0]).info.weights == (None, None)  # they were never in a file
    folder = shutil.copytree(fp32_export, tmp_path / "export")
    contract = json.loads((folder / "contract.json").read_text())
    about = weights_of("town.safetensors", ABOUT)
    contract["weights"] = {"name": about.name, "trained_on": about.trained_on}
    (folder / "contract.json").write_text(json.dumps(contract))
    assert Runtime(folder).step(*live_frames[0]).info.weights == about


def test_ids_unknown_velocities_attributes_and_padding(results, live_kind):
    result = results[live_kind][0]
    assert isinstance(result, LiveObjects if live_kind == "predictor" else NumpyLiveObjects)
    boxes, lines = result.boxes, result.lines
    boxes.valid[1], boxes.attribute[0], boxes.velocity[2] = False, 3, float("nan")
    ids = Ids(np.arange(len(boxes.score)), np.full(len(lines.score), -1))
    record = result._replace(ids=ids).to_dict()
    boxes.valid[1] = True
    assert not complaints(record) and len(record["boxes"]) == len(boxes.score) - 1
    assert [box["id"] for box in record["boxes"][:3]] == [0, 2, 3] and "id" not in record["lines"][0]
    assert record["boxes"][0]["attribute"] == ATTRIBUTES[3] and record["boxes"][1]["velocity"] == [None, None]
    again = type(result).from_dict(record)
    assert again.boxes.attribute[0] == 3 and np.isnan(np.asarray(again.boxes.velocity[1])).all()
    assert again.ids.boxes.tolist()[:3] == [0, 2, 3] and (again.ids.lines == -1).all()
    assert again.to_dict() == record


def test_a_result_without_anything(results, make_live, live_kind):
    record = results[live_kind][0].to_dict() | {"boxes": [], "lines": [], "time_s": None, "global_from_ego": None}
    assert not complaints(record)
    kind = type(results[live_kind][0])
    empty = kind.from_dict(record)
    assert empty.boxes.center.shape == (0, 3) and len(empty.lines.points) == 0 and empty.info.time_s is None
    assert empty.to_dict() == record


def test_numbers_that_are_not_finite_are_refused(results):
    boxes = results["runtime"][0].boxes
    broken = results["runtime"][0]._replace(boxes=boxes._replace(score=np.full_like(boxes.score, np.inf)))
    with pytest.raises(DataError, match="not finite"):
        broken.to_json()


def at(record, path):
    for key in path[:-1]:
        record = record[key]
    return record, path[-1]


MALFORMED = (
    (("format",), "perception-result-0", r"result: format is \"perception-result-0\"; this version reads"),
    (("frame",), "lidar", r"result: frame is \"lidar\"; this version reads \"ego\""),
    (("boxes",), {}, r"result: boxes is \{\}; give a list"),
    (("boxes", 1, "class"), "cat", r"result: boxes\[1\]: class is .cat.; did you mean car"),
    (("boxes", 1, "center"), [1.0, 2.0], r"result: boxes\[1\]: center is \[1.0, 2.0\]; give 3 numbers"),
    (("boxes", 1, "velocity"), [None, "x"], r"result: boxes\[1\]: velocity is"),
    (("boxes", 1, "colour"), "red", r"result: boxes\[1\] has the unknown key 'colour'"),
    (("boxes", 0, "attribute"), "flying", r"result: boxes\[0\]: attribute is .flying."),
    (("lines", 0, "points"), [[0.0, 1.0]], r"result: lines\[1\] has 6 points and lines\[0\] 1; all lines"),
    (("lines", 0, "closed"), 1, r"result: lines\[0\]: closed is 1; give true or false"),
    (("lines", 0, "seen"), [True], r"result: lines\[0\]: seen is \[true\]; give a list of 6 times true or false"),
    (("lines", 0, "class"), None, r"result: lines\[0\]: class is (None|null or missing); give one of divider"),
    (("warnings",), [3], r"result: warnings is \[3\]; give a list of text"),
    (("weights", "name"), 3, r"result: weights: name is 3; give text or null"),
    (("memory", "used"), "no", r"result: memory: used is \"no\"; give true or false"),
    (("extra",), 1, r"result has the unknown key 'extra'"),
    (("global_from_ego",), [[1.0]], r"result: global_from_ego is .*; give 4 x 4 numbers"),
)


@pytest.mark.parametrize(("path", "value", "message"), MALFORMED, ids=[".".join(map(str, m[0])) for m in MALFORMED])
def test_malformed_results_are_named(results, path, value, message):
    record = copy.deepcopy(results["runtime"][0].to_dict())
    where, key = at(record, path)
    where[key] = value
    with pytest.raises(DataError, match=message):
        NumpyLiveObjects.from_dict(record)
    if path != ("lines", 0, "points"):  # a schema cannot compare lengths
        assert complaints(record)


def test_text_that_is_no_result_is_named():
    with pytest.raises(DataError, match=r"frame.json is not JSON .*; give what to_json returned"):
        LiveObjects.from_json("{", "frame.json")
    with pytest.raises(DataError, match=r"result is \[\]; give keys and values"):
        LiveObjects.from_json("[]")


def test_results_are_read_without_torch(results, tmp_path):
    (tmp_path / "result.json").write_text(results["predictor"][1].to_json())
    code = f"""
import sys
for name in ("torch", "PIL", "yaml", "scipy", "cv2"):
    sys.modules[name] = None  # importing it is an ImportError
from perception.types import NumpyLiveObjects
text = open({str(tmp_path / "result.json")!r}).read()
assert NumpyLiveObjects.from_json(text).to_json() == text
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROJECT)
    assert run.returncode == 0, run.stderr
