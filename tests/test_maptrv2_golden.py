"""MapTRv2: parity of the head, its losses and their gradients with outputs of the published code."""

import json

import pytest
import torch
from safetensors.torch import load_file

from perception.models.maptr.losses import maptr_losses, match_lines
from perception.models.maptr.model import topk_lines
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.encoder import camera_parameters, lifted_points
from perception.models.maptrv2.losses import MAPTRV2_LOSS_WEIGHTS, depth_loss, segmentation_losses
from perception.models.maptrv2.model import MapTRv2
from perception.models.published.backbone import PublishedBackboneConfig
from perception.types import CameraRig

CLOSE = {"atol": 1e-4, "rtol": 0}
LINE_TERMS = {"cls": "class", "pts": "points", "dir": "direction"}


@pytest.fixture(scope="module")
def published(golden):
    folder = golden / "maptrv2"
    content = json.loads((folder / "config.json").read_text())
    parts = (load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs"))
    return content, *parts


@pytest.fixture
def network(published) -> MapTRv2:
    """The network with the published head, in evaluation mode."""
    content, weights, inputs, _ = published
    config = MapTRv2Config(
        image_size=tuple(content["img"]),
        backbone=PublishedBackboneConfig(width=4, channels=content["dim"]),
        bev=(content["bev_h"], content["bev_w"]),
        point_cloud_range=tuple(content["pc_range"]),
        channels=content["dim"],
        feed_forward=content["ffn"],
        heads=content["heads"],
        decoder_layers=content["dec"],
        lines=content["num_vec_one2one"],
        line_points=content["num_pts"],
        max_lines=content["max_num"],
        level_embeddings=content["level_embeds"],
        cameras=len(inputs["camera2ego"]),
        classes=content["num_classes"],
        one_to_many_queries=content["num_vec_one2many"],
        one_to_many_repeats=content["k_one2many"],
        depth_range=tuple(content["dbound"]),
        aspp_channels=content["aspp"],
        splat_scale=content["downsample"],
        image_scale=content["img_scale"],
    )
    network = MapTRv2(config).eval()
    network.head.load_state_dict({name.removeprefix("pts_bbox_head."): tensor for name, tensor in weights.items()})
    return network


def arguments(published) -> tuple[torch.Tensor, CameraRig, torch.Tensor, tuple[int, int]]:
    """Features, rig with the calibrated poses, pose of the LiDAR and size of the images, as the head takes them."""
    _, _, inputs, _ = published
    img_from_cam = inputs["img_aug_matrix"].float()[:, :3, :3] @ inputs["camera_intrinsics"][:, :3, :3]
    rig = CameraRig(img_from_cam[None], inputs["camera2ego"][None], torch.ones(1, len(img_from_cam), dtype=torch.bool))
    H, W = inputs["img_shape"][:2].tolist()
    return inputs["img_feat"], rig, inputs["lidar2ego"][None], (H, W)


@torch.no_grad()
def test_one_frame_and_decoded_lines(network, published):
    content, _, _, expected = published
    features, rig, ego_from_lidar, size = arguments(published)
    config, encoder = network.config, network.head.transformer.encoder
    torch.testing.assert_close(camera_parameters(rig, config.image_scale), expected["inter_mlp_input"], **CLOSE)
    points = lifted_points(config, rig, ego_from_lidar, size, tuple(content["feat"]))
    torch.testing.assert_close(points, expected["inter_geom"], **CLOSE)
    bev, _ = encoder(features, rig, ego_from_lidar, size)
    torch.testing.assert_close(bev.flatten(2).permute(2, 0, 1), expected["bev_embed"], **CLOSE)
    found = network.head(features, rig, ego_from_lidar, size)
    torch.testing.assert_close(found.depth_logits.softmax(2), expected["depth"], **CLOSE)
    torch.testing.assert_close(found.logits, expected["all_cls_scores"], **CLOSE)
    torch.testing.assert_close(found.points, expected["all_pts_preds"], **CLOSE)
    torch.testing.assert_close(found.bev_seg_logits, expected["seg"], **CLOSE)
    torch.testing.assert_close(found.image_seg_logits, expected["pv_seg"], **CLOSE)
    network.head.training = True  # this flag only: batch norm and dropout stay in evaluation mode
    many = network.head(features, rig, ego_from_lidar, size)
    torch.testing.assert_close(many.one_to_many_logits, expected["many_all_cls_scores"], **CLOSE)
    torch.testing.assert_close(many.one_to_many_points, expected["many_all_pts_preds"], **CLOSE)
    scores, labels, metres = topk_lines(found.logits[-1], found.points[-1], config.low, config.high, config.max_lines)
    box = torch.cat([metres.amin(2), metres.amax(2)], -1)[0]
    for name, limits, least_score in (
        ("decoded", content["post"], 0.0),
        ("decoded_filtered", content["post_tight"], content["thr"]),
    ):
        low, high = torch.tensor(limits).view(2, 4)
        keep = ((box >= low) & (box <= high)).all(-1) & (scores[0] > least_score)
        torch.testing.assert_close(scores[0, keep], expected[f"{name}_scores"], **CLOSE)
        assert torch.equal(labels[0, keep], expected[f"{name}_labels"])
        torch.testing.assert_close(metres[0, keep], expected[f"{name}_pts"], atol=1e-3, rtol=0)


def nearest_returns(depth: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns the least depth [B, N, h, w] of the returns [B, N, H, W] in each feature pixel, infinite without any."""
    h, w = size
    depth = torch.where(depth > 0, depth, torch.inf)
    return depth.unflatten(3, (w, -1)).unflatten(2, (h, -1)).amin((3, 5))


def test_losses_and_gradients(golden, network, published):
    content = published[0]
    expected = json.loads((golden / "maptrv2_loss" / "loss.json").read_text())
    inputs, gradients = (load_file(golden / "maptrv2_loss" / f"{name}.safetensors") for name in ("inputs", "outputs"))
    features, rig, ego_from_lidar, size = arguments(published)
    features.requires_grad_()
    network.head.training = True
    prediction = network.head(features, rig, ego_from_lidar, size)
    orderings, label = inputs["gt_pts_orderings"][None], inputs["gt_labels"][None]
    exists = (orderings > -9999).all(-1).all(-1)
    low, high = network.config.low, network.config.high
    start, end = torch.tensor(low[:2]), torch.tensor(high[:2])
    terms, total = {}, torch.zeros(())
    for many, name, repeats in ((False, "", 1), (True, "_one2many", content["k_one2many"])):
        logits = prediction.one_to_many_logits if many else prediction.logits
        points = prediction.one_to_many_points if many else prediction.points
        gt = [x.repeat_interleave(repeats, 1) for x in (orderings, exists, label, torch.ones_like(label).bool())]
        normalized = (gt[0] - start) / (end - start)
        for layer in range(len(logits)):
            match, best = match_lines(logits[layer].detach(), points[layer].detach(), normalized, *gt[1:])
            assigned = torch.zeros(logits.shape[2], dtype=torch.int64)
            assigned[match.query] = match.target // repeats + 1
            if many:
                assert assigned.tolist() == expected["one2many_assigned_gt_base_inds"][layer]
            else:
                assert assigned.tolist() == expected["assigned_gt_inds"][layer]
                assert best[0].tolist() == expected["order_index"][layer]
        layers = maptr_losses(logits, points, *gt, low, high)
        for layer, values in enumerate(layers):
            prefix = "" if layer == len(layers) - 1 else f"d{layer}."
            terms |= {f"{prefix}loss_{key}{name}": values[f"line_{ours}"] for key, ours in LINE_TERMS.items()}
    depth = nearest_returns(inputs["gt_depth"], tuple(content["feat"]))
    others = segmentation_losses(
        network, prediction, inputs["gt_seg"].float(), inputs["gt_pv_seg"].float(), rig.present
    ) | {"depth": depth_loss(network, prediction, depth, rig.present)}
    terms |= {"loss_seg": others["bev_seg"], "loss_pv_seg": others["image_seg"], "loss_depth": others["depth"]}
    assert others.keys() | {f"line_{x}" for x in LINE_TERMS.values()} <= MAPTRV2_LOSS_WEIGHTS.keys()
    assert {name for name, value in expected["losses"].items() if value} <= terms.keys()
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected["losses"][name], rel=1e-6), name
    total = torch.stack(list(terms.values())).sum()
    assert total.item() == pytest.approx(expected["total"], rel=1e-6)
    total.backward()
    torch.testing.assert_close(features.grad, gradients["grad_img_feat"], **CLOSE)
    for name, parameter in network.head.named_parameters():
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert norm == pytest.approx(expected["grad_l2"][f"pts_bbox_head.{name}"], rel=1e-3, abs=1e-6), name
