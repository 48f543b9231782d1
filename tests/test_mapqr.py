"""MapQR: parity with outputs of the published code, its losses by hand, and batches."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from test_maptrv2 import EGO_FROM_LIDAR, LINES, RIG, SIZE, frame

from perception.grid import BEVGrid
from perception.models.checkpoint import import_published, load_model, save_checkpoint
from perception.models.decoding import empty_boxes
from perception.models.mapqr.config import MapQRConfig
from perception.models.mapqr.decoder import sine_embedding
from perception.models.mapqr.encoder import project_heights
from perception.models.mapqr.model import MapQR, MapQRHead, MapQROutputs
from perception.models.maptr.losses import lidar_lines
from perception.models.maptr.model import topk_lines
from perception.models.maptrv2.losses import draw_lines_in_bev, draw_lines_in_images
from perception.models.published.backbone import FPNConfig, PublishedBackboneConfig
from perception.models.published.geometry import lidar_projections
from perception.types import Frame, FrameObjects, map_tensors

CLOSE = {"atol": 1e-4, "rtol": 0}
SMALL = MapQRConfig(
    image_size=SIZE, backbone=FPNConfig(stages=3, stride=16), bev=(20, 10), channels=16, feed_forward=24, heads=2,
    encoder_layers=2, decoder_layers=2, pillar_points=4, lines=6, line_points=5, one_to_many_queries=8,
    one_to_many_repeats=2, max_lines=4, cameras=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def published(golden):
    """The published configuration, inputs and outputs, and the head with the published weights."""
    folder = golden / "mapqr"
    found = json.loads((folder / "config.json").read_text())
    weights, inputs, expected = (load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs"))
    config = MapQRConfig(
        backbone=PublishedBackboneConfig(channels=found["dim"]),
        bev=(found["bev_h"], found["bev_w"]),
        point_cloud_range=tuple(found["pc_range"]),
        channels=found["dim"],
        feed_forward=found["ffn"],
        heads=found["heads"],
        encoder_layers=found["enc"],
        decoder_layers=found["dec"],
        lines=found["num_vec_one2one"],
        line_points=found["num_pts"],
        max_lines=found["max_num"],
        one_to_many_queries=found["num_vec_one2many"],
        one_to_many_repeats=found["k_one2many"],
        level_embeddings=found["level_embeds"],
        pillar_points=found["pillar"],
        gkt_kernel=tuple(found["kernel"]),
        cameras=len(inputs["lidar2img"]),
    )
    head = MapQRHead(config).eval()
    head.load_state_dict({name.removeprefix("pts_bbox_head."): tensor for name, tensor in weights.items()})
    return found, inputs, expected, head


def predict(head, inputs):
    size = tuple(inputs["img_shape"][:2].tolist())
    return head(inputs["img_feat"], inputs["lidar2img"][None], inputs["can_bus"][None], size, EGO_FROM_LIDAR)


@torch.no_grad()
def test_one_frame_and_decoded_lines(published):
    found, inputs, expected, head = published
    config = head.config
    prediction, bev = predict(head, inputs)
    assert prediction.one_to_many_logits.shape[2] == 0
    points = prediction.points[-1]
    assert prediction.points.amin() < 0.4 and prediction.points.amax() > 0.6  # the lines are spread over the range
    for ours, name in (
        (bev.transpose(0, 1), "bev_embed"),
        (prediction.logits, "all_cls_scores"),
        (prediction.points, "all_pts_preds"),
        (prediction.bev_seg_logits, "seg"),
        (prediction.image_seg_logits, "pv_seg"),
    ):
        torch.testing.assert_close(ours, expected[name], **CLOSE)
    scores, labels, metres = topk_lines(prediction.logits[-1], points, config.low, config.high, config.max_lines)
    # The published decoder drops lines whose bounding box has a corner outside `post`, and weak ones.
    box = torch.cat([metres.amin(2), metres.amax(2)], -1)[0]
    for name, limits, least_score in (
        ("decoded", found["post"], 0.0),
        ("decoded_filtered", found["post_tight"], found["thr"]),
    ):
        low, high = torch.tensor(limits).view(2, 4)
        keep = ((box >= low) & (box <= high)).all(-1) & (scores[0] > least_score)
        torch.testing.assert_close(scores[0, keep], expected[f"{name}_scores"], **CLOSE)
        assert torch.equal(labels[0, keep], expected[f"{name}_labels"])
        torch.testing.assert_close(metres[0, keep], expected[f"{name}_pts"], atol=1e-3, rtol=0)


@torch.no_grad()
def test_each_layer(published):
    """Learned heights, projected pillars, and what every attention and layer returns."""
    found, inputs, expected, head = published
    config, transformer = head.config, head.transformer
    outputs, hooks = {}, []

    def watch(name, module):
        hooks.append(module.register_forward_hook(lambda _, __, output: outputs.update({name: output})))

    for i, layer in enumerate(transformer.encoder.layers):
        watch(f"encoder{i}", layer)
        watch(f"attention{i}.0", layer.attentions[0])
        watch(f"attention{i}.1", layer.attentions[1])
    for i, layer in enumerate(transformer.decoder.layers):
        watch(f"decoder{i}", layer)
    watch("reference", transformer.reference_points)
    prediction, _ = predict(head, inputs)
    for hook in hooks:
        hook.remove()
    size = tuple(inputs["img_shape"][:2].tolist())
    for i in range(found["enc"]):
        query, heights = outputs[f"attention{i}.1"]
        torch.testing.assert_close(heights.transpose(1, 2), expected[f"inter_layer{i}_heights"], **CLOSE)
        references, inside = project_heights(config, heights, inputs["lidar2img"][None], size)
        mask = expected[f"inter_layer{i}_bev_mask"].bool().transpose(0, 1)  # [B, N, h * w, Z]
        assert torch.equal(inside, mask) and 0 < mask.float().mean() < 1
        wanted = expected[f"inter_layer{i}_reference_points_cam"].transpose(0, 1)
        torch.testing.assert_close(references[mask], wanted[mask], **CLOSE)
        torch.testing.assert_close(outputs[f"attention{i}.0"], expected[f"inter_layer{i}_attn0"], **CLOSE)
        torch.testing.assert_close(query, expected[f"inter_layer{i}_attn1"], **CLOSE)
        torch.testing.assert_close(outputs[f"encoder{i}"][0], expected[f"inter_encoder_layer{i}"], **CLOSE)
    torch.testing.assert_close(outputs["reference"].sigmoid(), expected["inter_init_reference"], **CLOSE)
    for i in range(found["dec"]):
        torch.testing.assert_close(outputs[f"decoder{i}"].transpose(0, 1), expected["inter_hs"][i], **CLOSE)
    torch.testing.assert_close(prediction.points.flatten(-2), expected["inter_references"], **CLOSE)


@torch.no_grad()
def test_one_to_many_queries_change_nothing_else(published):
    """They exist in training only, and queries of the two kinds do not attend to each other."""
    _, inputs, expected, head = published
    alone, _ = predict(head, inputs)
    head.training = True  # this flag only, as in the published numbers
    both, _ = predict(head, inputs)
    head.training = False
    torch.testing.assert_close(both.one_to_many_logits, expected["many_all_cls_scores"], **CLOSE)
    torch.testing.assert_close(both.one_to_many_points, expected["many_all_pts_preds"], **CLOSE)
    torch.testing.assert_close(both.logits, alone.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(both.points, alone.points, atol=1e-5, rtol=0)


@pytest.mark.slow  # 125 million parameters
def test_checkpoints_are_recognised_by_their_keys(official_keys, tmp_path):
    shapes = json.loads((official_keys / "mapqr_nusc_r50_24ep.json").read_text())
    weights = {  # one number each, so that the file is small
        key: torch.tensor(7) if key.endswith("num_batches_tracked") else torch.tensor(i / 1000).expand(shape)
        for i, (key, shape) in enumerate(shapes.items())
    }
    torch.save({"state_dict": weights}, tmp_path / "mapqr.pth")
    network = import_published(tmp_path / "mapqr.pth")
    assert network.config == MapQRConfig() and not network.training
    offset = "transformer.encoder.layers.2.attentions.1.height_offsets.weight"
    assert torch.equal(network.state_dict()[f"head.{offset}"], weights[f"pts_bbox_head.{offset}"])


def test_sine_embedding_by_hand():
    found = sine_embedding(torch.tensor([[0.25, 0.1]]), 8)[0]
    y, x = 0.2 * math.pi, 0.5 * math.pi
    expected = [f(angle / step) for angle in (y, x) for step in (1, 100) for f in (math.sin, math.cos)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def network() -> MapQR:
    """A network whose every parameter has an effect."""
    torch.manual_seed(0)
    model = MapQR(SMALL).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@torch.inference_mode()
def test_samples_of_a_batch_and_absent_cameras(network, tmp_path):
    """Sample k of a batch gives what it gives alone. The image of an absent camera changes nothing."""
    gone = RIG._replace(present=torch.tensor([[True, False]]))
    turned = RIG._replace(ego_from_cam=RIG.ego_from_cam.flip(1))
    frames = [frame(0), frame(1)._replace(rig=turned), frame(2)._replace(rig=gone)]
    state = network.initial_state(1)
    alone = [network(each, state)[0] for each in frames]
    images, rig, *rest = zip(*frames, strict=True)
    batch = Frame(torch.cat(images), type(RIG)(*map(torch.cat, zip(*rig, strict=True))), *map(torch.cat, rest))
    together = network(batch, network.initial_state(3))[0]
    for k, each in enumerate(alone):
        torch.testing.assert_close(together.points[:, k : k + 1], each.points, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.logits[:, k : k + 1], each.logits, atol=1e-5, rtol=1e-5)
    assert (alone[0].points - alone[1].points).abs().max() > 1e-3
    black = frames[2].images.clone()
    black[:, 1] = 0
    again = network(frames[2]._replace(images=black), state)[0]
    assert torch.equal(again.points, alone[2].points)
    objects = network.decode(alone[0])
    assert objects.lines.points.shape == (1, 4, 5, 2) and objects.boxes.score.shape == (1, 0)
    save_checkpoint(tmp_path / "w.safetensors", network, {})
    loaded = load_model(tmp_path / "w.safetensors")
    assert loaded.config == SMALL and torch.equal(loaded(frames[0], state)[0].points, alone[0].points)


@torch.inference_mode()
def test_projection_is_float32_under_autocast(network):
    """bfloat16 would move projected points by whole pixels."""
    heights = torch.rand(1, 200, 4)
    matrix = torch.rand(1, 2, 4, 4) * 100
    expected, _ = project_heights(SMALL, heights, matrix, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = project_heights(SMALL, heights, matrix, SIZE)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.fixture(scope="module")
def perfect() -> MapQROutputs:
    """Two layers and two one-to-many copies that predict the one line of `LINES`, with logits of 20."""
    (low_x, low_y, _), (high_x, high_y, _) = SMALL.low, SMALL.high
    low, extent = torch.tensor([low_x, low_y]), torch.tensor([high_x - low_x, high_y - low_y])
    line = lidar_lines(LINES, EGO_FROM_LIDAR).points[0, 0]
    points = ((line - low) / extent).expand(2, 1, 8, 5, 2).clone()
    logits = torch.full((2, 1, 8, 3), -20.0)
    logits[:, :, 2:4, 0] = 20
    points[:, :, [0, 1, *range(4, 8)]] = 0.9
    grid = BEVGrid((low_x, high_x), (low_y, high_y), (10, 20))
    bev = 40 * draw_lines_in_bev(lidar_lines(LINES, EGO_FROM_LIDAR), grid) - 20
    drawn = draw_lines_in_images(lidar_lines(LINES, EGO_FROM_LIDAR), lidar_projections(frame()), SIZE, (4, 6))
    image = 40 * drawn - 20
    return MapQROutputs(logits[:, :, 3:], points[:, :, 3:], logits, points, bev, image, EGO_FROM_LIDAR)


def losses_of(network, prediction) -> dict[str, float]:
    boxes = map_tensors(lambda x: torch.zeros(1, 1, *x.shape[2:], dtype=x.dtype), empty_boxes(1, "cpu"))
    return {name: float(loss) for name, loss in network.loss(prediction, FrameObjects(boxes, LINES), frame()).items()}


def test_losses_by_hand(network, perfect):
    """Each term in closed form; matching and terms are MapTRv2's, which has published numbers."""
    losses = losses_of(network, perfect)
    assert losses.keys() == MapQR.loss_weights.keys() and max(losses.values()) < 1e-4
    points = perfect.one_to_many_points.clone()
    points[:, 0, 3, :, 0] += 0.01
    moved = losses_of(network, perfect._replace(one_to_many_points=points))
    # Two layers, one of two copies, five points; loss weight 5.
    assert moved["one_to_many_points"] == pytest.approx(2 * 5 * 0.05 / 2, rel=1e-3) and moved["line_points"] < 1e-4
    points = perfect.points.clone()
    points[1, 0, 0, :, 1] -= 0.01
    assert losses_of(network, perfect._replace(points=points))["line_points"] == pytest.approx(0.25, rel=1e-3)
    unsure = losses_of(network, perfect._replace(logits=torch.zeros_like(perfect.logits)))
    # Focal loss of 5 queries x 3 classes at 0.5, one of them positive, over one pair; two layers; loss weight 2.
    assert unsure["line_class"] == pytest.approx(2 * 2 * 0.25 * math.log(2) * (0.25 + 14 * 0.75), rel=1e-3)
    zero = losses_of(
        network, perfect._replace(bev_seg_logits=torch.zeros(1, 1, 20, 10), image_seg_logits=torch.zeros(1, 2, 1, 4, 6))
    )
    drawn = int((perfect.bev_seg_logits > 0).sum())  # counts four times
    assert zero["bev_seg"] == pytest.approx(math.log(2) * (200 + 3 * drawn) / 200, rel=1e-4) and drawn > 1
    assert zero["image_seg"] == pytest.approx(2 * math.log(2), rel=1e-4)


def test_every_parameter_learns(network, perfect):
    """Gradients of the loss reach all parameters but the published weights of the loss."""
    network.zero_grad()
    boxes = map_tensors(lambda x: torch.zeros(1, 1, *x.shape[2:], dtype=x.dtype), empty_boxes(1, "cpu"))
    network.head.training = True
    prediction, _ = network(frame(), network.initial_state(1))
    network.head.training = False
    sum(network.loss(prediction, FrameObjects(boxes, LINES), frame()).values()).backward()
    silent = {name for name, p in network.head.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"code_weights"}
