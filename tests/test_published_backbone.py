"""Image encoders of the published networks against what the published code itself returns."""

import json

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
    tolerances = {"grad_value": 1e-5, "grad_sampling_locations": 1e-4, "grad_attention_weights": 1e-4}
    for tensor, (name, atol) in zip(inputs, tolerances.items(), strict=True):
        torch.testing.assert_close(tensor.grad, data[name], atol=atol, rtol=1e-5)


@torch.no_grad()
def test_resnet_and_pyramid(golden):
    folders = sorted(path.parent for path in (golden / "backbone").glob("*/config.json"))
    assert folders
    for folder in folders:
        compare_backbone(folder)


def compare_backbone(folder):
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
        torch.testing.assert_close(x, expected[f"stage{i + 1}"], atol=2e-4, rtol=1e-5)
    for i, x in enumerate(levels):
        torch.testing.assert_close(x, expected[f"fpn{i}"], atol=2e-4, rtol=1e-5)
    assert f"fpn{len(levels)}" not in expected
