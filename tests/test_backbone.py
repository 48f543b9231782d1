"""Image encoders: parity of backbones with torchvision and mmdet, freezing, errors."""

from contextlib import nullcontext

import pytest
import torch
import torchvision
from conftest import RAW, noisy

from perception.data.loader import collate
from perception.data.nuscenes import NuScenesDataset
from perception.engine.mmcv_ops import install_stub
from perception.engine.training import TrainingModel
from perception.errors import CheckpointError, ConfigError
from perception.export.onnx import export_onnx
from perception.export.runtime import Runtime
from perception.models.backbone import FPNEncoder, load_backbone, read_backbone_weights
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.synthetic import VERSION

IMAGES = torch.rand(1, 3, 64, 96) * 255
NORMALISED = (IMAGES - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)) / torch.tensor(
    [58.395, 57.12, 57.375]
).view(3, 1, 1)


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """Randomises batch norm statistics and scales, so that weights in the wrong place change the output."""
    generator = torch.Generator().manual_seed(1)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    network.eval()  # a statement, because eval() of mmdet backbones returns None
    return network


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_tiny"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_weights_give_the_published_network(name, suffix, tmp_path):
    network = shaken(getattr(torchvision.models, name)(weights=None))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(network.state_dict(), path)
    encoder = FPNEncoder(name, 4, 16, 32).eval()
    load_backbone(encoder.backbone, path)
    if name.startswith("resnet"):
        x = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(NORMALISED)))))
        expected = [x]
        for stage in (network.layer2, network.layer3, network.layer4):
            expected.append(stage(expected[-1]))
    else:
        x, expected = NORMALISED, []
        for i, part in enumerate(network.features):
            x = part(x)
            expected += [x] if i % 2 else []
    for found, wanted in zip(encoder.backbone(NORMALISED), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert encoder(IMAGES).shape == (1, 32, 4, 6)


@torch.no_grad()
def test_mmdet_backbones_are_usable():
    install_stub()
    from mmdet.models.backbones import ResNeXt

    encoder = FPNEncoder("mmdet:ResNeXt?depth=50&groups=32&base_width=4&style=pytorch", 4, 16, 32).eval()
    network = shaken(ResNeXt(depth=50, groups=32, base_width=4, style="pytorch"))
    weights = {f"backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    encoder.backbone.load_published(weights | {"bbox_head.fc.weight": torch.zeros(1)}, "detector.pth")
    for found, wanted in zip(encoder.backbone(NORMALISED), network(NORMALISED), strict=True):
        torch.testing.assert_close(found, wanted)
    assert encoder(IMAGES).shape == (1, 32, 4, 6)


DLA = "mmdet3d:DLANet?depth=34&norm_cfg={'type':'BN'}&out_indices=(2,3,4,5)"
ENCODERS = [
    ("timm:regnety_002", 3, ""), ("timm:convnextv2_atto", 2, ""), (DLA, 4, ""), ("resnet18", 3, "mmdet:PAFPN"),
    ("resnet18", 3, "mmdet3d:SECONDFPN?out_channels=(8,8)&upsample_strides=(1,2)"),
]  # fmt: skip


def require(*names: str) -> None:
    """Skips a test without the libraries of parts such as "timm:regnety_002"."""
    for name in names:
        if ":" in name:
            pytest.importorskip(name.partition(":")[0], reason="comes with an extra of driving-perception")


@torch.no_grad()
@pytest.mark.parametrize("name", ["regnety_002", "convnextv2_atto", "mobilenetv4_conv_small"])
def test_weights_of_timm_give_its_network(name):
    require("timm:")
    import timm

    network = shaken(timm.create_model(name, pretrained=False))
    encoder = FPNEncoder(f"timm:{name}", 4, 8, 16).eval()
    encoder.backbone.load_published(network.state_dict(), "timm.safetensors")
    wanted = network.forward_intermediates(NORMALISED, intermediates_only=True)
    by_size = {x.shape[-1]: x for x in wanted}
    for found, side in zip(encoder.backbone(NORMALISED), (24, 12, 6, 3), strict=True):
        torch.testing.assert_close(found, by_size[side], atol=1e-5, rtol=1e-4)
    with pytest.raises(CheckpointError, match="is missing or has another shape"):
        encoder.backbone.load_published({}, "timm.safetensors")


@torch.no_grad()
def test_backbones_of_mmdet3d_are_usable():
    require(DLA)
    install_stub()
    from mmdet3d.models.backbones import DLANet

    encoder = FPNEncoder(DLA, 4, 8, 16).eval()
    network = shaken(DLANet(depth=34, norm_cfg={"type": "BN"}))
    encoder.backbone.load_published(network.state_dict(), "smoke.pth")
    for found, wanted in zip(encoder.backbone(NORMALISED), network(NORMALISED)[2:], strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backbone, stages, neck", ENCODERS)
def test_the_flagship_learns_with_encoders_of_other_libraries(backbone, stages, neck, town_root):
    require(backbone, neck)
    size = (64, 96) if "mmdet3d" in backbone + neck else (44, 84)  # those of mmdet3d take multiples of 32 or 16
    config = BEVTransformerConfig.preset(
        "nano", image_size=size, grid=(20, 20), channels=16, depth_bins=8, backbone=backbone, neck=neck,
        backbone_stages=stages, decoder_layers=2, box_queries=20, line_queries=8,
    )  # fmt: skip
    clip = collate([NuScenesDataset(town_root, VERSION, "town_val", image_size=config.image_size)[0]])
    model = TrainingModel(BEVTransformer(config))
    encoder = model.core.image_encoder
    # The size that the rest of the network counts on, also where sides are no multiples of the stride.
    assert encoder(clip.frames.images[0, 0, :1]).shape[-2:] == encoder.feature_size(config.image_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in encoder.named_parameters()}
    losses, _ = model(clip, None)
    sum(losses.values()).backward()
    optimizer.step()
    # Some libraries keep layers that they do not use.
    assert sum(tensor.grad is not None for tensor in encoder.parameters()) > 0.6 * len(before)
    moved = {name for name, tensor in encoder.named_parameters() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith("neck.") for name in moved) == bool(neck)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, refused", [("regnety_002", ""), ("convnextv2_atto", "Erf .* was not checked for any parser")]
)
def test_an_export_with_a_backbone_of_timm_is_in_the_dialect_or_refused(name, refused, tmp_path):
    require("timm:")
    config = BEVTransformerConfig.preset(
        "nano", image_size=(40, 80), grid=(20, 20), channels=16, depth_bins=8, backbone=f"timm:{name}",
        backbone_stages=2, decoder_layers=2, box_queries=20, line_queries=8, line_points=6,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=refused) if refused else nullcontext():
        Runtime(export_onnx(noisy(BEVTransformer, config), tmp_path / "export", raw_size=RAW))


@pytest.mark.parametrize("name", ["resnet18", "mmdet:ResNeXt?depth=50&groups=32&base_width=4"])
@torch.no_grad()
def test_the_backbone_of_a_checkpoint_is_loaded(name, tmp_path):
    from safetensors.torch import save_file

    install_stub()
    network = FPNEncoder(name, 4, 8, 16).eval()
    path = tmp_path / "nano.safetensors"
    save_file({f"image_encoder.{key}": tensor for key, tensor in shaken(network).state_dict().items()}, path)
    encoder = FPNEncoder(name, 4 if ":" in name else 3, 8, 32).eval()
    load_backbone(encoder.backbone, path)
    for found, wanted in zip(encoder.backbone(NORMALISED), network.backbone(NORMALISED), strict=False):
        torch.testing.assert_close(found, wanted)
    with pytest.raises(CheckpointError, match=r"conv1\.weight is missing"):
        load_backbone(FPNEncoder("resnet50", 3, 8, 32).backbone, path)


def test_frozen_stages_keep_their_weights():
    encoder = FPNEncoder("resnet18", 3, 8, 16)
    encoder.backbone.freeze(1)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.train()
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    encoder(IMAGES).square().mean().backward()
    optimizer.step()
    same = {name for name, tensor in encoder.state_dict().items() if torch.equal(tensor, before[name])}
    frozen = {name for name in before if name.startswith(("backbone.stem", "backbone.stages.0"))}
    assert frozen and frozen <= same
    assert not any(name in same for name in before if name.startswith("backbone.stages.1") and before[name].ndim > 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("vgg16", 4, 16, 8), r"model\.backbone is 'vgg16'; use one of resnet18"),
        (("resnet18", 2, 16, 8), r"feature_stride 16 does not exist with backbone_stages 2; use one of \[4, 8\]"),
        (("mmdet:Nothing?depth=50", 4, 16, 8), r"mmdet has no backbone 'Nothing'; it has "),
        (("mmdet:ResNet?depth=7", 4, 16, 8), r"mmdet's ResNet rejects \{'depth': 7\}"),
        (("mmdet:ResNet?depth=50&strides=(1,2,2,1)", 4, 16, 8), r"gives no maps at strides 4, 8, 16 and 32"),
        (("mmdet3d:Nothing", 4, 16, 8), r"mmdet3d has no backbone 'Nothing'; it has "),
        (
            ("mmdet3d:PointNet2SASSG?in_channels=3", 4, 16, 8),
            r"mmdet3d's PointNet2SASSG (rejects|does not take images)",
        ),
        (("timm:nothing_b0", 4, 16, 8), r"timm has no network 'nothing_b0'; near are "),
        (("timm:vit_tiny_patch16_224", 4, 16, 8), r"gives no maps at strides 4, 8, 16, 32 .*use a convolutional"),
        (("timm:regnety_002?colour=3", 4, 16, 8), r"gives no maps at strides .*'colour': 3"),
        (("resnet18", 3, 8, 16, "mmdet:Nothing"), r"model\.neck: mmdet has no neck 'Nothing'"),
        (("resnet18", 3, 8, 16, "mmdet:FPN?colour=3"), r"model\.neck: mmdet's FPN rejects .*'colour': 3"),
        (
            ("resnet18", 3, 8, 16, "mmdet3d:SECONDFPN?out_channels=(8,9)&upsample_strides=(1,2)"),
            "gives 17 channels at 1/1 .*give it 16 at 1/1",
        ),
        (("resnet18", 3, 8, 16, "mmdet3d:SECONDFPN?out_channels=(8,8)"), "change its options|rejects"),
        (("resnet18", 3, 8, 16, "PAFPN"), r"model\.neck is 'PAFPN'; write mmdet:NAME"),
    ],
)
def test_invalid_encoders_are_refused(arguments, sentence):
    require(*(text for text in arguments if isinstance(text, str)))
    with pytest.raises(ConfigError, match=sentence):
        FPNEncoder(*arguments)


def test_sizes_that_an_encoder_cannot_take_are_refused():
    require(DLA)
    for encoder in (FPNEncoder(DLA, 4, 8, 16), FPNEncoder("resnet18", 4, 16, 16, ENCODERS[-1][2])):
        assert encoder.feature_size((64, 96))[0] in (4, 8)
        with pytest.raises(ConfigError, match=r"model\.image_size is 64 x 90; .* multiples of 32"):
            encoder.feature_size((64, 90))


def test_invalid_freezing_and_weights_are_refused(tmp_path):
    encoder = FPNEncoder("resnet18", 3, 8, 16)
    with pytest.raises(ConfigError, match=r"train\.frozen_stages is 4; use -1 to 3"):
        encoder.backbone.freeze(4)
    with pytest.raises(ConfigError, match=r"give frozen_stages in model\.backbone"):
        FPNEncoder("mmdet:ResNet?depth=50", 4, 16, 8).backbone.freeze(1)
    with pytest.raises(CheckpointError, match=r"conv1\.weight is missing, shape \(64, 3, 7, 7\) is needed"):
        encoder.backbone.load_published({"other": torch.zeros(1)}, "w.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        read_backbone_weights(tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not readable as plain tensors"):
        read_backbone_weights(tmp_path / "bad.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_backbone_weights(tmp_path / "list.pth")
