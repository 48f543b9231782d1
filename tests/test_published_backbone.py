"""Image encoders of the published networks against what the published code itself returns."""

import json

import pytest
import torch
from safetensors.torch import load_file

from perception.models.published.backbone import PublishedBackboneConfig, PublishedFPN, PublishedResNet
from perception.ops.deformable import deformable_attention


def test_deformable_attention_and_its_gradients(golden):
    data = load_file(golden / "msda" / "msda.safetensors")
    inputs = [data[k].clone().requires_grad_() for k in ("value", "sampling_locations", "attention_weights")]
    found = deformable_attention(inputs[0], data["spatial_shapes"].tolist(), *inputs[1:])
    torch.testing.assert_close(found, data["output"], atol=1e-5, rtol=0)
    (found * data["grad_output"]).sum().backward()
    names = ("grad_value", "grad_sampling_locations", "grad_attention_weights")
    for tensor, name in zip(inputs, names, strict=True):
        torch.testing.assert_close(tensor.grad, data[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["r50_pytorch_fpn1", "r101_caffe_dcn_fpn4"])
def test_resnet_and_pyramid(golden, name):
    folder = golden / "backbone" / name
    told = json.loads((folder / "config.json").read_text())
    backbone, neck = told["backbone"], told["neck"]
    config = PublishedBackboneConfig(
        depth=backbone["depth"],
        caffe=backbone["style"] == "caffe",
        deformable=tuple(backbone.get("stage_with_dcn", (False,) * 4)),
        outputs=tuple(backbone["out_indices"]),
        levels=neck["num_outs"],
        width=backbone["base_channels"],
        channels=neck["out_channels"],
    )
    params = load_file(folder / "params.safetensors")
    backbone, pyramid = (
        PublishedResNet(config).eval(),
        PublishedFPN(neck["in_channels"], config.channels, config.levels),
    )
    for module, prefix in ((backbone, "img_backbone."), (pyramid, "img_neck.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)})
    maps = backbone(load_file(folder / "inputs.safetensors")["img"])
    levels = pyramid([maps[stage] for stage in config.outputs])
    expected = load_file(folder / "outputs.safetensors")
    for i, x in enumerate(maps):
        torch.testing.assert_close(x, expected[f"stage{i + 1}"], atol=1e-4, rtol=1e-5)
    for i, x in enumerate(levels):
        torch.testing.assert_close(x, expected[f"fpn{i}"], atol=1e-4, rtol=1e-5)
    assert f"fpn{len(levels)}" not in expected
