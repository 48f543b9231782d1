"""The front door: everything people use has a name in `perception`, and nothing is loaded before it is used."""

import ast
import importlib
import subprocess
import sys

import pytest
from conftest import PROJECT

import perception

HEAVY = ("mmcv", "mmdet", "mmdet3d", "mmengine", "nuscenes", "matplotlib", "cv2", "tensorboard", "embreex", "trimesh")


def loaded_by(code: str) -> set[str]:
    """The packages that are loaded after some code has run in a fresh process."""
    code = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_every_name_is_there_and_type_checkers_see_the_same():
    assert len(set(perception.__all__)) == len(perception.__all__)
    assert set(perception.__all__) <= set(dir(perception))
    tree = ast.parse((PROJECT / "perception" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert set(seen) | {"__version__"} == set(perception.__all__)
    for name, module in seen.items():
        assert getattr(perception, name) is getattr(importlib.import_module(module), name), name
    with pytest.raises(AttributeError, match="module 'perception' has no attribute 'Perdictor'"):
        perception.Perdictor  # noqa: B018


def test_import_loads_nothing():
    assert not loaded_by("import perception; perception.__version__; dir(perception)") & {"numpy", "torch", *HEAVY}


def test_what_needs_no_torch_loads_none():
    """Every process that scores lanes would load it, and a vehicle has none."""
    names = "CameraRig, FrameObjects, MapLine, PerceptionError, Runtime, evaluate_lanes"
    assert "torch" not in loaded_by(f"from perception import {names}")


def test_networks_and_live_use_load_no_training_packages():
    loaded = loaded_by(
        "from perception import BEVGrid, Predictor, load_model\n"
        "import perception.models.bev_transformer.losses, perception.cameras, perception.targets"
    )
    assert "torch" in loaded and not loaded & set(HEAVY)


FIRST_RESULT = """
import numpy as np
from perception import Predictor
from perception.types import NumpyCameraRig
pose = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
rig = NumpyCameraRig(np.array([[[300.0, 0, 224], [0, 300, 88], [0, 0, 1]]]), pose[None], np.ones(1, dtype=bool))
assert len(Predictor("nano").step(np.full((1, 176, 448, 3), 99, dtype=np.uint8), rig).boxes.score) > 0
"""


def test_live_use_loads_little_more_than_torch():
    """A vehicle that starts waits for them; torchvision loads the compiler and takes almost as long as PyTorch."""
    slow = {"torchvision", "scipy", "shapely", "sympy", "triton", "torch._dynamo", "torch._inductor", *HEAVY}
    code = f"{FIRST_RESULT}\nimport sys\nprint(*{slow} & set(sys.modules), 'perception')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["perception"]


def test_one_loader_for_names_and_files(tmp_path):
    network = perception.load_model("nano")
    path = PROJECT / "perception" / "weights" / "nano.safetensors"
    assert not network.training and perception.load_model(path).config == network.config
    with pytest.raises(perception.PerceptionError, match=r"device 'abacus' cannot be used here .*; use 'cpu'"):
        perception.load_model("nano", device="abacus")
    with pytest.raises(perception.PerceptionError, match="no such checkpoint"):
        perception.read_metrics(tmp_path / "absent.safetensors")
