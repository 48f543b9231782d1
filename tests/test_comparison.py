"""Comparisons: means and spreads by hand, gains above the spread, finished runs are not repeated."""

import dataclasses

import pytest

from perception.engine.comparison import Comparison, Cost, compare, measure_costs
from perception.engine.config import load_config
from perception.errors import ConfigError
from perception.models import build_network
from perception.synthetic import VERSION

ZERO = dict.fromkeys(("nds", "mAP", "mATE", "mAOE", "mAVE", "lane_mAP"), 0.0)
CONFIG = """
model = dict(preset="nano", image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2,
             decoder_layers=1, box_queries=10, line_queries=8)
train_data = dict(dataroot={root!r}, version={version!r}, split="town_val", augment=dict())
val_data = dict(dataroot={root!r}, version={version!r}, split="town_val")
train = dict(image_epochs=0, epochs=1, batch_size=1, streams=1, frames_per_clip=2, drop_frames=0.0, lr=2e-3,
             weight_decay=0.01, warmup_iters=2, grad_clip=10.0, ema_momentum=0.0, val_every=5, log_every=1, workers=0)
"""


def test_a_gain_is_more_than_the_spread():
    result = Comparison(
        {
            "plain": [ZERO | {"nds": 0.30, "lane_mAP": 0.50}, ZERO | {"nds": 0.32, "lane_mAP": 0.52}],
            "more": [ZERO | {"nds": 0.34, "lane_mAP": 0.51}, ZERO | {"nds": 0.35, "lane_mAP": 0.544}],
        }
    )
    assert result.mean("more", "nds") == pytest.approx(0.345) and result.spread("more", "nds") == pytest.approx(0.01)
    assert result.gain("more", "nds") == pytest.approx(0.035)  # beyond the 0.02 of the first
    assert result.gain("more", "lane_mAP") is None  # 0.017, within 0.034
    row = result.table().splitlines()[3]
    assert row.startswith("| more | 0.345 ± 0.005* |") and row.endswith("| 0.527 ± 0.017 |")
    assert result.as_dict()["more"]["nds"]["gain"] == pytest.approx(0.035) and "cost" not in result.as_dict()["more"]
    costs = {"plain": Cost(1_500_000, 12.34, 0.1, 1.0), "more": Cost(2_000_000, 10.0, 0.05, 0.5)}
    row = dataclasses.replace(result, costs=costs).table().splitlines()[3]
    assert row.startswith("| more | 0.345 ± 0.005* |") and row.endswith("| 2.00 | 10.0 | 50 | 0.50 |")


def test_costs_are_those_of_the_networks(tmp_path, town_root):
    path = tmp_path / "small.py"
    path.write_text(CONFIG.format(root=str(town_root), version=VERSION))
    wide = load_config(path, {"model.channels": 32})
    costs = measure_costs({"small": load_config(path), "wide": wide}, passes=1)
    network = build_network(wide.model)
    assert costs["wide"].parameters == sum(p.numel() for p in network.parameters()) > costs["small"].parameters
    assert costs["wide"].gflops > costs["small"].gflops > 0 and costs["small"].seconds > 0
    assert costs["small"].share == 1
    assert costs["wide"].share == pytest.approx(costs["wide"].seconds / costs["small"].seconds)  # of one pass


@pytest.mark.slow
def test_variants_are_trained_once(tmp_path, town_root):
    path = tmp_path / "small.py"
    path.write_text(CONFIG.format(root=str(town_root), version=VERSION))
    variants = {"plain": load_config(path), "slow / still": load_config(path, {"train.lr": 1e-9})}
    result = compare(variants, (0, 1), tmp_path / "out")
    assert {name: len(runs) for name, runs in result.runs.items()} == {"plain": 2, "slow / still": 2}
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("out/*/*.safetensors")}
    assert len(before) == 8
    again = compare(variants, (0, 1), tmp_path / "out")
    assert again == result and before == {file: file.stat().st_mtime_ns for file in before}
    with pytest.raises(ConfigError, match="at least two different seeds"):
        compare(variants, (1, 1), tmp_path / "out")
