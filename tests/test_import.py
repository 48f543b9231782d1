"""`import perception` is light: a vehicle has none of the training packages."""

import json
import subprocess
import sys

CODE = """
import json, sys, time
start = time.perf_counter()
import perception
seconds = time.perf_counter() - start
import perception.geometry, perception.grid, perception.models.bev_transformer.losses, perception.types
import perception.models.bev_transformer.model, perception.models.bev_transformer.decoder
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""
HEAVY = ("mmcv", "mmdet", "mmdet3d", "mmengine", "nuscenes", "matplotlib", "cv2", "tensorboard", "embreex", "trimesh")


def test_import_is_light_and_fast():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    report = json.loads(run.stdout)
    roots = {name.partition(".")[0] for name in report["modules"]}
    assert "perception" in roots
    assert not roots & set(HEAVY)
    assert report["seconds"] < 3.0


def test_scoring_lanes_needs_no_torch():
    """Evaluation runs in many processes, each of which would load it."""
    code = "import sys, perception.evaluation; assert 'torch' not in sys.modules; assert perception.BEVGrid"
    subprocess.run([sys.executable, "-c", code], check=True)
