"""Image encoders: parity of backbones with torchvision and mmdet, freezing, errors."""

import pytest
import torch
import torchvision

from perception.engine.mmcv_ops import install_stub
from perception.errors import CheckpointError, ConfigError
from perception.models.backbone import FPNEncoder, load_backbone, read_backbone_weights

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
        (("mmdet:ResNet?depth=50&strides=(1,2,2,1)", 4, 16, 8), r"do not have strides 4, 8, 16 and 32"),
    ],
)
def test_invalid_encoders_are_refused(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FPNEncoder(*arguments)


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
