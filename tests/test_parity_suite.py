"""The parity suite itself: it runs on a clone, and on other golden data of the same layout."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BUNDLED_GOLDEN, PROJECT
from douglas_peucker import possible_simplifications
from safetensors.torch import load_file, save_file

TURN = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # upright boxes of crossings stay upright boxes
SHIFT = np.array([3210.25, -777.5, 0.0])


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def move_map(folder):
    """Another place and location; fewer poses in another order; the other vertex where rounding decides which stays."""
    (old,) = (folder / "maps" / "expansion").glob("*.json")

    def move_nodes(content):
        for node in content["node"]:
            node["x"], node["y"] = TURN[:2, :2] @ [node["x"], node["y"]] + SHIFT[:2]

    edit_json(old, move_nodes)
    old.rename(old.with_name("elsewhere.json"))
    half = np.sqrt(0.5)

    def change_poses(content):
        content["location"] = "elsewhere"
        content["poses"] = content["poses"][:2:-1]
        for pose in content["poses"]:
            pose["ego2global_translation"] = (TURN @ pose["ego2global_translation"] + SHIFT).tolist()
            w, x, y, z = pose["ego2global_rotation"]
            pose["ego2global_rotation"] = [half * (w - z), half * (x - y), half * (y + x), half * (z + w)]

    edit_json(folder / "poses.json", change_poses)
    ties = 0

    def change_expected(content):
        nonlocal ties
        for key in content:
            content[key] = content[key][:2:-1]
            for line in [line for pose in content[key] for line in pose["lines"] if "simplified_pts" in line]:
                points = np.array(line["pts"])
                for outcome in possible_simplifications(points, 0.2):
                    if not np.array_equal(points[list(outcome)], line["simplified_pts"]):
                        line["simplified_pts"], ties = points[list(outcome)].tolist(), ties + 1

    edit_json(folder / "expected.json", change_expected)
    assert ties > 0
    samples = dict(np.load(folder / "maptr_samples.npz"))
    poses = len({name.split("_")[0] for name in samples})
    kept = {name.replace(f"pose{i}_", f"pose{poses - 1 - i}_"): samples[name]
            for i in range(3, poses) for name in samples if name.startswith(f"pose{i}_")}  # fmt: skip
    np.savez(folder / "maptr_samples.npz", **kept)


def narrow_boxes(folder):
    """A range of box centres that drops some boxes."""
    outputs = load_file(folder / "outputs.safetensors")
    limits = [-40.0, -45.0, -4.0, 38.0, 42.0, 2.5]
    edit_json(folder / "config.json", lambda content: content.update(post_center_range=limits))
    low, high = torch.tensor(limits).view(2, 3)
    for frame in ("frame1", "frame2"):
        center = outputs[f"{frame}.det_boxes"][:, :3]
        keep = ((center >= low) & (center <= high)).all(1)
        assert 0 < keep.sum() < len(keep)
        for name in ("det_scores", "det_labels", "det_boxes", "det_boxes_bottom"):
            outputs[f"{frame}.{name}"] = outputs[f"{frame}.{name}"][keep]
    save_file(outputs, folder / "outputs.safetensors")


def narrow_lines(folder):
    """A range of lines that drops some of them."""
    outputs = load_file(folder / "outputs.safetensors")
    limits = [-14.0, -29.0, -14.0, -29.0, 12.0, 20.0, 12.0, 20.0]
    edit_json(folder / "config.json", lambda content: content.update(post=limits))
    low, high = torch.tensor(limits).view(2, 4)
    keep = ((outputs["decoded_bboxes"] >= low) & (outputs["decoded_bboxes"] <= high)).all(1)
    assert 0 < keep.sum() < len(keep)
    for name in ("bboxes", "labels", "pts", "scores"):
        outputs[f"decoded_{name}"] = outputs[f"decoded_{name}"][keep]
    save_file(outputs, folder / "outputs.safetensors")


PER_CAMERA = (
    "img_feat", "lidar2img", "camera2ego", "camera_intrinsics", "img_aug_matrix", "cams_embeds", "bev_mask",
    "reference_points_cam", "pv_seg", "depth", "depth_net", "geom", "mlp_input", "feat0", "feat1", "feat2",
    "projection_mat", "image_wh", "focal", "depth0", "depth1",
)  # fmt: skip


def turn_cameras(folder):
    """The cameras in another order, with their embeddings: each gets the neighbour's place."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(PER_CAMERA):
                # The batch is the first axis where it is not the cameras; two tensors have both in one axis.
                camera = 1 if tensor.shape[:2] in ((1, 6), (2, 6)) else 0
                split = tensor.unflatten(0, (2, 6)) if len(tensor) == 12 else tensor
                turned = split.roll(1, 1 if len(tensor) == 12 else camera)
                tensors[name] = turned.reshape(tensor.shape).contiguous()
        save_file(tensors, path)


def fewer_frames(folder, count):
    """The first frames of a sequence, at another place and another time: the network sees relative poses only."""
    world = torch.eye(4, dtype=torch.float64)
    world[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    world[:3, 3] = torch.tensor([-250.0, 90.0, 3.0])
    edit_json(folder / "config.json", lambda content: content.update(num_frames=count))
    for path in folder.glob("*puts*.safetensors"):
        kept = {k: x for k, x in load_file(path).items() if int(k.split(".")[0].removeprefix("frame")) <= count}
        for name, tensor in kept.items():
            if name.endswith("T_global"):
                kept[name] = world @ tensor
            if name.endswith("timestamp"):
                kept[name] = tensor + 1000.0
        save_file(kept, path)


def reverse_ground_truth(folder):
    """Losses of the first frame only, with boxes and lines of the ground truth in reverse order."""
    losses = json.loads((folder / "loss.json").read_text())
    (folder / "loss.json").write_text(json.dumps({k: x for k, x in losses.items() if k.startswith("frame1.")}))
    inputs, outputs = (
        {k: x for k, x in load_file(folder / f"{name}.safetensors").items() if k.startswith("frame1.")}
        for name in ("inputs", "outputs")
    )
    for name in outputs:
        sample = int(name[-1]) if name[-1].isdigit() else 0
        number = len(inputs[f"frame1.gt_{'map_' if '.map.' in name else ''}labels{sample}"])
        if ".assigned" in name:
            outputs[name] = torch.where(outputs[name] < 0, outputs[name], number - 1 - outputs[name])
        elif ".cost" in name:
            outputs[name] = outputs[name].flip(1).contiguous()
        elif ".order" in name:
            outputs[name] = outputs[name].flip(0).contiguous()
    save_file({name: tensor.flip(0).contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
    save_file(outputs, folder / "outputs.safetensors")


def one_plain_frame(folder):
    """The losses without denoising of one frame only, those with denoising of two."""
    edit_json(folder / "loss.json", lambda content: [content["plain"].pop(k) for k in ("frame2", "frame2.grad_l2")])
    for name in ("inputs", "outputs"):
        path = folder / f"{name}.safetensors"
        save_file({k: x for k, x in load_file(path).items() if "plain.frame2." not in k}, path)


def fewer_decoded(folder):
    """Fewer decoded lines: the best ones of those that were decoded."""
    outputs = load_file(folder / "outputs.safetensors")
    content = json.loads((folder / "config.json").read_text())
    most = content["max_num"]
    assert len(outputs["decoded_scores"]) == most  # no line was outside the range
    last = outputs["decoded_scores"][most - 3]
    for kind in ("decoded", "decoded_filtered"):
        keep = outputs[f"{kind}_scores"] >= last
        for name in ("bboxes", "labels", "pts", "scores"):
            outputs[f"{kind}_{name}"] = outputs[f"{kind}_{name}"][keep]
    edit_json(folder / "config.json", lambda content: content.update(max_num=most - 2))
    save_file(outputs, folder / "outputs.safetensors")


def other_golden(golden, folder):
    """A second golden folder: what the published code would have given for other places, ranges and names."""
    shutil.copytree(golden, folder)
    move_map(folder / "map_gt")
    narrow_boxes(folder / "bevformer")
    for name in ("maptr_gkt", "maptrv2", "mapqr"):
        fewer_decoded(folder / name)
    for name in ("maptr", "maptr_gkt", "maptrv2", "mapqr"):
        narrow_lines(folder / name)
    for name in ("maptr", "maptr_gkt", "maptrv2", "maptrv2_loss", "mapqr", "sparse4d", "sparsedrive", "sparse4d_loss"):
        turn_cameras(folder / name)
    fewer_frames(folder / "sparse4d", 4)
    fewer_frames(folder / "sparsedrive", 3)
    one_plain_frame(folder / "sparse4d_loss")
    reverse_ground_truth(folder / "sparsedrive_loss")
    for number, path in enumerate(sorted((folder / "backbone").glob("*/"))):
        path.rename(path.with_name(f"other{number}"))
    for name in ("inputs", "outputs"):
        path = folder / "bevformer_loss" / f"{name}.safetensors"
        save_file({k.replace("case_b", "other"): v for k, v in load_file(path).items() if "case_a" not in k}, path)
    for name in ("polylines", "expected"):
        edit_json(
            folder / "map_eval" / f"{name}.json",
            lambda content: content.get("cases", content).update(other=content.get("cases", content).pop("main")),
        )
    return folder


def run_suite(golden):
    """The tests that read golden numbers, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "PERCEPTION_GOLDEN"}
    if golden is not None:
        environment["PERCEPTION_GOLDEN"] = str(golden)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "golden",
        "-p",
        "no:cacheprovider",
        "-k",
        "not imported_whole",
    ]
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_other_data_of_the_same_layout(tmp_path):
    done = run_suite(other_golden(BUNDLED_GOLDEN, tmp_path / "golden"))
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_a_wrong_folder_is_named(tmp_path):
    """A suite that skips itself would prove nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "golden", "-p", "no:cacheprovider", "tests/test_maptr.py"]
    environment = os.environ | {"PERCEPTION_GOLDEN": str(tmp_path / "nowhere")}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and f"not at {tmp_path}/nowhere; correct or unset PERCEPTION_GOLDEN" in done.stdout
