"""The outputs of the shipped weights, on images and a rig in closed form, are those of the day they were trained.

A change of the network that is meant to keep its outputs has to keep these numbers. After new weights are shipped,
`python tests/test_shipped_weights.py` writes them again.
"""

import json
from pathlib import Path

import numpy as np
import torch

from perception.cameras import usual_mounting
from perception.geometry import rigid_from_yaw
from perception.models.checkpoint import load_model
from perception.types import CameraRig, Frame

GOLDEN = Path(__file__).parent / "golden" / "shipped" / "nano.json"
AHEAD = np.array([[0.0, 0, 1, 1.2], [-1, 0, 0, 0.1], [0, -1, 0, 1.6], [0, 0, 0, 1]])  # ego_from_cam, looking along x
SKIPPED = 37  # every so many numbers of a dense output are compared


def frames(image_size: tuple[int, int]) -> list[Frame]:
    """Three frames of five cameras, of which one is missing in the second frame; the vehicle drives a bend."""
    H, W = image_size
    v, u = np.mgrid[:H, :W].astype(np.float64)
    wave = [np.sin(u / 9 + k) * np.cos(v / (5 + k)) + np.where(v > 0.6 * H, 0.8, -0.3) for k in range(5)]
    poses = np.stack([rigid_from_yaw(2 * np.pi * n / 5) @ AHEAD for n in range(5)])
    focal = 0.55 * W
    img_from_cam = np.array([[focal, 0, 0.49 * W], [0, focal, 0.52 * H], [0, 0, 1]])
    found = []
    for k in range(3):
        images = np.stack([np.stack([wave[n] + 0.1 * c + 0.2 * k for c in range(3)]) for n in range(5)])
        present = np.array([True, True, k != 1, True, True])
        rig = CameraRig(np.stack([img_from_cam] * 5), poses, present)
        found.append(
            Frame(
                torch.from_numpy((110 + 50 * images).clip(0, 255)).float()[None],
                CameraRig(*(torch.from_numpy(part)[None] for part in rig)),
                torch.from_numpy(np.linalg.inv(rigid_from_yaw(0.04, (1.5, 0.1, 0)))).float()[None],
                torch.tensor([0.2 * (k > 0)]),
                torch.tensor([k == 0]),
                *usual_mounting(1, 5),
            )
        )
    return found


@torch.no_grad()
def numbers() -> dict[str, list[float]]:
    """Returns samples of dense outputs, and means over the queries of each layer, because their order may change."""
    model = load_model("nano").eval()
    state, found = model.initial_state(1), {}
    for k, frame in enumerate(frames(model.config.image_size)):
        prediction, state = model(frame, state)
        dense = {name: getattr(prediction.images, name) for name in prediction.images._fields}
        dense |= {"bev_seg_logits": prediction.bev_seg_logits, "heatmap_logits": prediction.heatmap_logits}
        dense |= {"memory": state.bev}
        for name, value in dense.items():
            found[f"{k} {name}"] = value.flatten()[:: SKIPPED * max(1, value.numel() // 5000)].tolist()
        for name in prediction._fields:
            value = getattr(prediction, name)
            if name not in dense and name != "images":  # [L, B, Q, ...]
                found[f"{k} {name}"] = value.mean((1, 2)).flatten().tolist()
        boxes, lines, _ = model.decode(prediction)
        found[f"{k} decoded"] = [
            boxes.score[boxes.valid].sum().item(), lines.score[lines.valid].sum().item(), boxes.valid.sum().item(),
            boxes.size.mean().item(), boxes.uncertainty.mean().item(), lines.points.abs().mean().item(),
            lines.closed.float().mean().item(),
        ]  # fmt: skip
    return found


def test_the_shipped_weights_give_the_numbers_they_gave():
    expected, found = json.loads(GOLDEN.read_text()), numbers()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        scale = max(1.0, float(np.abs(values).mean()))
        np.testing.assert_allclose(found[name], values, atol=2e-3 * scale, rtol=2e-3, err_msg=name)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(json.dumps({name: [round(x, 5) for x in values] for name, values in numbers().items()}, indent=0))
