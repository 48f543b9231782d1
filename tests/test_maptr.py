"""MapTR: parity with outputs of the published code, evaluation, and live use."""

import json

import pytest
import torch
from safetensors.torch import load_file

from perception.cameras import usual_mounting
from perception.data.nuscenes import NuScenesDataset
from perception.engine.config import load_config
from perception.engine.training import train
from perception.engine.weights import load_weights
from perception.errors import CheckpointError, ConfigError
from perception.evaluation.dataset import evaluate_dataset
from perception.inference.predictor import Predictor
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bevformer.config import BEVFormerConfig
from perception.models.bevformer.model import BEVFormer
from perception.models.checkpoint import load_model, save_checkpoint
from perception.models.mapqr.config import MapQRConfig
from perception.models.mapqr.model import MapQR
from perception.models.maptr.config import MapTRConfig
from perception.models.maptr.model import MapTR, MapTRHead, RawLines, topk_lines
from perception.models.published.backbone import PublishedBackboneConfig
from perception.models.published.geometry import project_pillars
from perception.synthetic import VERSION
from perception.types import CameraRig


@torch.no_grad()
@pytest.mark.parametrize("network", ["maptr", "maptr_gkt"])
def test_one_frame_and_decoded_lines(golden, network):
    """MapTR with deformable attention to the images, and with geometry-guided kernel attention."""
    folder = golden / network
    published = json.loads((folder / "config.json").read_text())
    weights, inputs, expected = (load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs"))
    config = MapTRConfig(
        backbone=PublishedBackboneConfig(channels=published["dim"]),
        bev=(published["bev_h"], published["bev_w"]),
        point_cloud_range=tuple(published["pc_range"]),
        channels=published["dim"],
        feed_forward=len(weights["pts_bbox_head.transformer.decoder.layers.0.ffns.0.layers.0.0.bias"]),
        encoder_layers=published["enc"],
        decoder_layers=published["dec"],
        lines=published["num_vec"],
        line_points=published["num_pts"],
        level_embeddings=len(weights["pts_bbox_head.transformer.level_embeds"]),
        pillar_points=expected["inter_bev_mask"].shape[-1],
        gkt_kernel=tuple(published["kernel"]) if "kernel" in published else None,
        heads=published.get("heads", MapTRConfig.heads),
        cameras=len(inputs["lidar2img"]),
    )
    head = MapTRHead(config).eval()
    head.load_state_dict({name.removeprefix("pts_bbox_head."): tensor for name, tensor in weights.items()})
    size = tuple(inputs["img_shape"][:2].tolist())
    matrix, bus = inputs["lidar2img"][None], inputs["can_bus"][None]
    assert torch.equal(
        project_pillars(config, matrix, size)[1], expected["inter_bev_mask"].bool().any(-1).transpose(0, 1)
    )
    logits, points, bev = head([inputs["img_feat"]], matrix, bus, size)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(bev, expected["bev_embed"].transpose(0, 1), **close)
    torch.testing.assert_close(logits, expected["all_cls_scores"], **close)
    torch.testing.assert_close(points, expected["all_pts_preds"], **close)
    scores, labels, metres = topk_lines(logits[-1], points[-1], config.low, config.high, published["max_num"])
    # The published decoder drops lines whose bounding box has a corner outside `post`, and weak ones.
    box = torch.cat([metres.amin(2), metres.amax(2)], -1)[0]
    for name, limits, least_score in (
        ("decoded", published["post"], 0.0),
        ("decoded_filtered", published["post_tight"], published["thr"]),
    ):
        low, high = torch.tensor(limits).view(2, 4)
        keep = ((box >= low) & (box <= high)).all(-1) & (scores[0] > least_score)
        torch.testing.assert_close(scores[0, keep], expected[f"{name}_scores"], **close)
        assert torch.equal(labels[0, keep], expected[f"{name}_labels"])
        torch.testing.assert_close(metres[0, keep], expected[f"{name}_pts"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("network", ["bevformer", "maptr", "mapqr"])
def test_imported_networks_are_evaluated(network, tmp_path, town_root):
    """Runs scripts/evaluate.py's functions on a network without lines and on one without boxes."""
    backbone = PublishedBackboneConfig(width=4, channels=32)
    small = {"backbone": backbone, "channels": 32, "feed_forward": 48, "heads": 4, "decoder_layers": 2}
    if network == "maptr":
        model = MapTR(MapTRConfig(image_size=(60, 90), bev=(20, 10), lines=6, **small))
    elif network == "mapqr":
        model = MapQR(MapQRConfig(image_size=(60, 90), bev=(20, 10), lines=6, pillar_points=4, **small))
    else:
        model = BEVFormer(BEVFormerConfig(image_size=(60, 90), bev=(20, 20), queries=12, encoder_layers=1, **small))
    data = NuScenesDataset(town_root, VERSION, "town_val", image_size=(60, 90))
    evaluation, stream = evaluate_dataset(model.eval(), data)
    assert 0 <= evaluation.detection.nds < 0.2 and 0 <= evaluation.lanes.mean_ap < 0.2
    assert len(stream.objects) == len(data) and evaluation.table()
    path = tmp_path / f"{network}.py"
    preset = {
        "bevformer": "bevformer_tiny", "maptr": "maptr_tiny_r50_24e_bevformer", "mapqr": "mapqr_nusc_r50_24ep",
    }[network]  # fmt: skip
    path.write_text(f"""
model = dict(preset={preset!r}, image_size=(60, 90))
val_data = dict(dataroot={str(town_root)!r}, version={VERSION!r}, split="town_val")
""")
    config = load_config(path)
    assert config.model.image_size == (60, 90) and config.train is None
    save_checkpoint(tmp_path / "w.safetensors", model, {})
    with pytest.raises(CheckpointError, match="the config's model has"):  # not the published size
        load_weights(tmp_path / "w.safetensors", config.model)
    with pytest.raises(CheckpointError, match="the config is for another network"):
        load_weights(tmp_path / "w.safetensors", BEVTransformerConfig.nano())
    with pytest.raises(ConfigError, match="has no section train"):
        train(config, tmp_path / "work")


@torch.inference_mode()
def test_lines_are_decoded_to_the_ego_frame_and_predicted_live(tmp_path):
    torch.manual_seed(0)
    config = MapTRConfig(
        image_size=(60, 90), backbone=PublishedBackboneConfig(width=4, channels=32), bev=(20, 10), channels=32,
        feed_forward=48, heads=4, decoder_layers=2, lines=6, line_points=5, cameras=1, max_lines=4,
    )  # fmt: skip
    model = MapTR(config).eval()
    # One line: LiDAR x 3 m (right), y from -6 to 6 m.
    logits = torch.full((1, 1, 6, 3), -9.0)
    logits[0, 0, 2, 1] = 3.0
    points = torch.rand(1, 1, 6, 5, 2)
    points[0, 0, 2] = torch.stack([torch.full((5,), 18 / 30), torch.linspace(24, 36, 5) / 60], -1)
    lines = model.decode(RawLines(logits, points, usual_mounting(len(logits[0]), 1)[0])).lines
    assert lines.label[0, 0] == 1 and lines.score[0, 0].item() == pytest.approx(0.9526, abs=1e-4)
    assert lines.points[0, 0, :, 0].tolist() == pytest.approx([-5.0563, -2.0563, 0.9437, 3.9437, 6.9437], abs=1e-4)
    assert lines.points[0, 0, :, 1].tolist() == pytest.approx([-3] * 5, abs=1e-5)
    points[0, 0, 2] = torch.tensor([[0.5, 0.5], [0.6, 0.5], [0.6, 0.6], [0.5, 0.6], [0.51, 0.51]])
    ring = model.decode(RawLines(logits, points, usual_mounting(len(logits[0]), 1)[0])).lines
    assert ring.closed[0, 0] and torch.equal(ring.points[0, 0, 0], ring.points[0, 0, -1])  # given 0.67 m apart
    save_checkpoint(tmp_path / "w.safetensors", model, {})
    assert load_model(tmp_path / "w.safetensors").config == config
    ahead = torch.tensor([[[0.0, 0, 1, 1.5], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]]])
    rig = CameraRig(torch.tensor([[[60.0, 0, 45], [0, 60, 30], [0, 0, 1]]]), ahead, torch.ones(1, dtype=torch.bool))
    image = torch.randint(0, 256, (1, 60, 90, 3), dtype=torch.uint8).numpy()
    objects = Predictor(tmp_path / "w.safetensors", min_seen=0).step(image, rig, torch.eye(4).double().numpy(), 0.0)
    assert objects.lines.points.shape == (4, 5, 2) and objects.boxes.score.shape == (0,)
    assert objects.lines.points.isfinite().all()
