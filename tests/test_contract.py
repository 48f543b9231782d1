"""A contract that is damaged, or names a file outside its folder, is rejected in one sentence."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from perception.errors import CheckpointError, DataError
from perception.export.contract import read_contract
from perception.export.export_rig import ExportRig
from perception.inference.ego_motion import JUMP_MARGIN_M, JUMP_MARGIN_RAD, MAX_GAP, MAX_SPEED, MAX_TURN_RATE
from perception.types import NumpyCameraRig

ENGINE = {"file": "model.sm89.engine", "gpu": "sm89", "package": "tensorrt-rtx", "package_version": "1.7"}
SOME_HASH = hashlib.sha256(b"").hexdigest()


@pytest.fixture
def folder(fp32_export, tmp_path) -> Path:
    return Path(shutil.copytree(fp32_export, tmp_path / "export"))


def rewrite(folder: Path, change) -> None:
    """Replaces the contract by the result of a function."""
    contract = json.loads((folder / "contract.json").read_text())
    (folder / "contract.json").write_text(json.dumps(change(contract)))


def without(key, *path):
    def change(contract):
        part = contract
        for step in path:
            part = part[step]
        del part[key]
        return contract

    return change


def with_value(value, *path):
    def change(contract):
        part = contract
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = value
        return contract

    return change


def with_file(name):
    return with_value(SOME_HASH, "sha256", name)


CALIBRATION = {
    "img_from_cam": [np.eye(3).tolist()] * 6,
    "ego_from_cam": [np.eye(4).tolist()] * 6,
    "ego_from_lidar": np.eye(4).tolist(),
}

DAMAGED = {
    "calibration": (with_value([], "calibration"), "calibration is list, not an object"),
    "calibration of fewer": (
        with_value(CALIBRATION | {"ego_from_cam": CALIBRATION["ego_from_cam"][:5]}, "calibration"),
        "calibration.ego_from_cam is not 6 x 4 x 4 finite numbers",
    ),
    "calibration of text": (
        with_value(CALIBRATION | {"ego_from_lidar": [["a"] * 4] * 4}, "calibration"),
        "calibration.ego_from_lidar is not 4 x 4 finite numbers",
    ),
    "half a calibration": (
        with_value({"img_from_cam": CALIBRATION["img_from_cam"]}, "calibration"),
        "calibration.ego_from_cam is not 6 x 4 x 4 finite numbers",
    ),
    "list": (lambda c: [c], "holds list, not an object"),
    "null": (lambda c: None, "holds NoneType, not an object"),
    "another format": (with_value("perception-export-0", "format"), "format is \"perception-export-0\""),
    "no format": (without("format"), "format is null or missing"),
    "no hashes": (without("sha256"), "sha256 is missing"),
    "empty hashes": (with_value({}, "sha256"), r'sha256 has no entry for "model\.onnx"'),
    "hashes of others alone": (with_value({"certificate.json": SOME_HASH}, "sha256"), r'no entry for "model\.onnx"'),
    "list of hashes": (with_value(["model.onnx"], "sha256"), "sha256 is of type list, not dict"),
    "empty hash": (with_value("", "sha256", "model.onnx"), r'sha256\["model\.onnx"\] is not a SHA-256'),
    "hash as number": (with_value(7, "sha256", "model.onnx"), r'sha256\["model\.onnx"\] is not a SHA-256'),
    "other hash": (with_value(SOME_HASH, "sha256", "model.onnx"), r"model\.onnx is not the file that .* written for"),
    "engine without hash": (with_value({"sm89": ENGINE}, "engines"), r'sha256 has no entry for "model\.sm89\.engine"'),
    "engine without file": (with_value({"sm89": {"gpu": "sm89"}}, "engines"), r'engines\["sm89"\] does not hold file'),
    "engine as text": (with_value({"sm89": "model.sm89.engine"}, "engines"), r'engines\["sm89"\] does not hold file'),
    "missing file": (with_file("calibration.bin"), r"calibration\.bin is missing"),
    "folder above": (with_file("../secret"), r'sha256 names "\.\./secret", which is not a file inside the folder'),
    "folder above, later": (with_file("engines/../../secret"), "not a file inside the folder"),
    "absolute": (with_file("/etc/passwd"), "sha256 names \"/etc/passwd\", which is not a file inside"),
    "home of Windows": (with_file("C:\\secret"), "not a file inside the folder"),
    "drive of Windows": (with_file("C:secret"), "not a file inside the folder"),
    "folder above of Windows": (with_file("..\\secret"), "not a file inside the folder"),
    "share of Windows": (with_file("\\\\host\\secret"), "not a file inside the folder"),
    "empty name": (with_file(""), "sha256 names \"\", which is not a file inside the folder"),
    "the folder": (with_file("."), "cannot be read"),
    "long name": (with_file("x" * 5000), "cannot be read"),
    "zero byte": (with_file("model\0"), "not a file inside the folder"),
    "no precision": (without("precision"), "precision is missing"),
    "precision as number": (with_value(16, "precision"), "precision is of type int, not str"),
    "no cameras": (without("cameras"), "cameras is missing"),
    "zero cameras": (with_value(0, "cameras"), "cameras is 0, not 1 or more"),
    "raw size as text": (with_value("900x1600", "raw_size"), "raw_size is of type str, not list"),
    "inputs as dict": (with_value({}, "inputs"), "inputs is of type dict, not list"),
    "no inputs": (with_value([], "inputs"), "inputs has no ego_from_cam"),
    "size as text": (with_value(["a", "b"], "image_size"), "image_size is"),
    "odd nv12": (with_value("nv12", "image_format"), "the shape of image_0 is not that of its raw_size"),
    "other classes": (with_value(["car"], "box_classes"), "box_classes is not the list of this version"),
    "limit as text": (with_value("2", "max_gap_s"), 'max_gap_s is "2", not a finite number'),
    "weights as text": (with_value("nano", "weights"), r'weights is "nano", not a name'),
    "training as text": (with_value({"name": "nano", "trained_on": "town"}, "weights"), "weights is .*, not a name"),
    "training with NaN": (
        with_value({"name": "nano", "trained_on": {"scenes": float("nan")}}, "weights"), "weights is .*, not a name"
    ),
    "negative limit": (with_value(-1, "jump_margin_m"), "jump_margin_m is -1, not"),
    "checks as number": (with_value({"onnxruntime": 3}, "checked"), "is not a list of text"),
    "input as text": (with_value("images", "inputs", 0), r"inputs\[0\] has no name, no shape .* or no dtype"),
    "input without name": (without("name", "inputs", 1), r"inputs\[1\] has no name"),
    "input without shape": (without("shape", "inputs", 1), r"inputs\[1\] has no name, no shape"),
    "shape as number": (with_value(6, "inputs", 1, "shape"), r"inputs\[1\] has no name, no shape"),
    "shape with text": (with_value(["N", 3, 3], "inputs", 1, "shape"), r"inputs\[1\] has no name, no shape"),
    "negative shape": (with_value([-6, 3, 3], "inputs", 1, "shape"), r"inputs\[1\] has no name, no shape"),
    "endless shape": (with_value([10**12], "outputs", 0, "shape"), r"outputs\[0\] has no name, no shape"),
    "output without dtype": (without("dtype", "outputs", 2), r"outputs\[2\] .* no dtype of .*float32"),
    "objects": (with_value("object", "outputs", 2, "dtype"), r"outputs\[2\] .* no dtype of"),
    "dtype as list": (with_value(["float32"], "outputs", 2, "dtype"), r"outputs\[2\] .* no dtype of"),
}  # fmt: skip


def test_damaged_contracts_are_rejected(folder):
    good = (folder / "contract.json").read_text()
    (folder.parent / "secret").write_bytes(b"")  # exists, with a matching hash
    for case, (change, message) in DAMAGED.items():
        (folder / "contract.json").write_text(good)
        rewrite(folder, change)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_contract(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value), case
    (folder / "contract.json").write_text(good)
    assert read_contract(folder) == json.loads(good)
    rewrite(folder, without("weights"))  # as in older exports
    assert "weights" not in read_contract(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_invalid_json_is_rejected(folder, content):
    (folder / "contract.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"contract\.json is not valid JSON"):
        read_contract(folder)


def test_other_paths_are_rejected(folder):
    with pytest.raises(CheckpointError, match=r"contract\.json is missing"):
        read_contract(folder / "model.onnx")
    with pytest.raises(CheckpointError, match="the folder of an export is NoneType; give its path"):
        read_contract(None)
    (folder / "contract.json").unlink()
    (folder / "contract.json").mkdir()
    with pytest.raises(CheckpointError, match=r"contract\.json cannot be read"):
        read_contract(folder)


def test_links_and_folders_inside_are_read(folder):
    shutil.move(folder / "model.onnx", folder.parent / "elsewhere.onnx")
    os.symlink(folder.parent / "elsewhere.onnx", folder / "model.onnx")
    (folder / "engines").mkdir()
    (folder / "engines" / "model.sm89.engine").write_bytes(b"")
    rewrite(folder, with_file("engines/model.sm89.engine"))
    rewrite(folder, with_value({"sm89": ENGINE | {"file": "engines/model.sm89.engine"}}, "engines"))
    assert read_contract(folder)["engines"]["sm89"]["gpu"] == "sm89"


def test_a_contract_holds_the_rules_of_the_memory(folder):
    contract = read_contract(folder)
    assert contract["max_gap_s"] == MAX_GAP == 2
    assert contract["max_speed_m_s"] == MAX_SPEED == 60 and contract["jump_margin_m"] == JUMP_MARGIN_M == 1
    assert contract["max_turn_rate_rad_s"] == MAX_TURN_RATE == 2 and contract["jump_margin_rad"] == JUMP_MARGIN_RAD
    meaning = {x["name"]: x["meaning"] for x in contract["inputs"]}["is_first"]
    rules = ["max_gap_s", "max_speed_m_s", "max_turn_rate_rad_s", "jump_margin_m", "jump_margin_rad"]
    assert all(rule in meaning for rule in rules)


def test_a_runtime_refuses_another_calibration_than_the_one_of_the_export(folder):
    """Cameras that are missing are not compared; numbers of float32 are the same."""
    rewrite(folder, with_value(CALIBRATION, "calibration"))
    fixed = ExportRig.of_contract(read_contract(folder))
    rig = NumpyCameraRig(fixed.img_from_cam.astype(np.float32), fixed.ego_from_cam.copy(), np.ones(6, bool))
    fixed.check(rig)
    rig.ego_from_cam[4, 0, 3] += 0.01
    with pytest.raises(DataError, match=r"rig.ego_from_cam\[4\] differs by up to 0.01 from the calibration"):
        fixed.check(rig)
    rig.present[4] = False
    fixed.check(rig)
    assert ExportRig.of_contract({}) is None
