"""What goes wrong with cameras: one is missing, the calibration is off, the images are bad.

Pure functions on a Frame with any leading dimensions; the world, and so the ground truth, stays what it is. Training
uses them (`perception.data.augment`), and so does the robustness card (`perception.evaluation.robustness`).

The kinds of bad images are those that RoboBEV (Xie et al., https://arxiv.org/abs/2405.17426) applies to camera networks
and that have a closed form without a picture of snow: bright, dark, fog, blur by motion, quantised colours; and noise
of the sensor, from Hendrycks and Dietterich (https://arxiv.org/abs/1807.01697) and Dong et al.
(https://arxiv.org/abs/2303.11040). Formulas and levels are our own and are told below, so numbers may not be compared
with those papers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import ConfigError
from perception.types import CameraRig, Frame

SEVERITIES = (1, 2, 3)

# Per kind, what it means at the three severities.
CORRUPTIONS = {
    "bright": (0.2, 0.35, 0.5),  # of full white, added to every pixel: bright parts drown in white
    "dark": (0.7, 0.5, 0.3),  # brightness of white after x -> level * x^2; with the noise of few photons
    "fog": (0.65, 0.45, 0.3),  # share of the light that comes through
    "blur": (0.01, 0.02, 0.03),  # length of the way that a point smears over, in image widths
    "noise": (0.08, 0.12, 0.18),  # standard deviation, of full white, in each pixel and channel
    "quantize": (4, 3, 2),  # bits that are left of eight
}
PHOTONS = 300.0  # that make a pixel white in a well lit image; their number fluctuates by its root
FOG_COLOR = 225.0  # of 255
FOG_PATCHES = (4, 7)  # patches of thinner and thicker fog over the height and the width of an image


def missing_camera(frame: Frame, camera: int) -> Frame:
    """The frame without one of its cameras: it is not present, and its image is black where anyone should look.

    Args:
        frame: with leading [...].
        camera: which of the N.
    """
    images, present = frame.images.clone(), frame.rig.present.clone()
    images[..., camera, :, :, :] = 0
    present[..., camera] = False
    return frame._replace(images=images, rig=frame.rig._replace(present=present))


def spare_cameras(rig: CameraRig) -> list[int]:
    """The cameras that are there and may go missing without any frame of [..., N] losing its last one."""
    present = rig.present.flatten(0, -2)  # [frames, N]
    lonely = present & (present.sum(-1, keepdim=True) == 1)
    return torch.nonzero(present.any(0) & ~lonely.any(0))[:, 0].tolist()


def turn_cameras(frame: Frame, rotations: np.ndarray) -> Frame:
    """The frame with a wrong calibration: cameras are said to be turned about their own centres, but are not.

    Args:
        frame: with leading [...]; all its frames get the same error.
        rotations: [N, 3] one rotation vector per camera: about ego x, y and z, radians.
    """
    wrong_from_true = torch.linalg.matrix_exp(_cross_matrix(torch.from_numpy(rotations).double()))  # [N, 3, 3]
    ego_from_cam = frame.rig.ego_from_cam.clone()
    turned = wrong_from_true @ ego_from_cam[..., :3, :3].double()
    ego_from_cam[..., :3, :3] = turned.to(ego_from_cam.dtype)
    return frame._replace(rig=frame.rig._replace(ego_from_cam=ego_from_cam))


def _cross_matrix(vectors: Tensor) -> Tensor:
    """[..., 3] -> [..., 3, 3] that multiplies like a cross product."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def perturb_extrinsics(frame: Frame, max_deg: float, rng: np.random.Generator) -> Frame:
    """Turns each camera's calibration by up to `max_deg` about the vertical, each by itself."""
    yaw = np.radians(rng.uniform(-max_deg, max_deg, frame.rig.present.shape[-1]))
    return turn_cameras(frame, yaw[:, None] * np.array([0.0, 0.0, 1.0]))


def yaw_cameras(frame: Frame, degrees: float, rng: np.random.Generator) -> Frame:
    """Turns each camera's calibration by exactly `degrees` about the vertical, to the left or right by chance."""
    signs = rng.choice([-1.0, 1.0], frame.rig.present.shape[-1])
    return turn_cameras(frame, np.radians(degrees) * signs[:, None] * np.array([0.0, 0.0, 1.0]))


def forget(frame: Frame) -> Frame:
    """The frame as the first one of a scene: there is no memory and no motion."""
    eye = torch.eye(4, dtype=frame.ego_from_prev.dtype).expand_as(frame.ego_from_prev)
    return frame._replace(
        ego_from_prev=eye.to(frame.ego_from_prev.device),
        seconds_since_prev=torch.zeros_like(frame.seconds_since_prev),
        is_first=torch.ones_like(frame.is_first),
    )


def corrupt_camera(frame: Frame, camera: int, kind: str, severity: int, rng: np.random.Generator) -> Frame:
    """The frame with bad images of one camera; those of frames where it is missing stay as they are.

    Args:
        frame: with leading [...] and uint8 images; fog and the direction of a blur are the same at all its frames.
        camera: which of the N.
        kind, severity, rng: as in `corrupt_images`.
    """
    images = frame.images.clone()
    old = images[..., camera, :, :, :]
    new = corrupt_images(old, kind, severity, rng)
    images[..., camera, :, :, :] = torch.where(frame.rig.present[..., camera, None, None, None], new, old)
    return frame._replace(images=images)


def corrupt_images(images: Tensor, kind: str, severity: int, rng: np.random.Generator) -> Tensor:
    """Images as a bad camera, bad light or bad weather would show them.

    Args:
        images: [..., 3, H, W] uint8.
        kind: a key of `CORRUPTIONS`.
        severity: 1, 2 or 3.
        rng: all randomness comes from here.

    Returns:
        Alike.

    Raises:
        ConfigError: the kind or the severity does not exist.
    """
    if kind not in CORRUPTIONS:
        raise ConfigError(f"corruption {kind!r} does not exist; use one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"severity of {kind} is {severity}; use 1, 2 or 3")
    level = CORRUPTIONS[kind][severity - 1]
    if kind == "bright":
        return (images.short() + round(255 * level)).clamp(max=255).byte()
    if kind == "dark":
        light = level * (images.float() / 255) ** 2
        return _to_bytes(255 * (light + (light / PHOTONS).sqrt() * _normal(images.shape, rng)))
    if kind == "noise":
        return _to_bytes(images.float() + 255 * level * _normal(images.shape, rng))
    if kind == "quantize":
        return images & (256 - 2 ** (8 - level))
    if kind == "fog":
        return _fog(images, level, rng)
    return _smear(images, images.shape[-1] * level, math.radians(rng.uniform(-45.0, 45.0)))


def _fog(images: Tensor, through: float, rng: np.random.Generator) -> Tensor:
    """Koschmieder's law, light * through + fog * (1 - through), with fog that is 0.5 to 1.5 times as thick by place."""
    thickness = torch.from_numpy(rng.uniform(0.5, 1.5, (1, 1, *FOG_PATCHES)).astype(np.float32))
    thickness = F.interpolate(thickness, size=images.shape[-2:], mode="bilinear", align_corners=True)[0, 0]  # [H, W]
    return _to_bytes(torch.lerp(torch.tensor(FOG_COLOR), images.float(), through**thickness))


def _smear(images: Tensor, length_px: float, angle: float) -> Tensor:
    """The mean of the image at equal steps of about a pixel along a straight way, whose middle is where it was.

    Whole pixels are added up, which is many times faster than a convolution with a long kernel.
    """
    margin = max(1, round(length_px / 2))
    steps = 2 * margin + 1
    along = torch.arange(steps) - margin
    down, right = (along * math.sin(angle)).round().int(), (along * math.cos(angle)).round().int()
    H, W = images.shape[-2:]
    wide = F.pad(images.reshape(-1, 1, H, W).float(), (margin,) * 4, mode="replicate")
    total = torch.zeros(len(wide), 1, H, W)
    for i, j in zip((margin + down).tolist(), (margin + right).tolist(), strict=True):
        total += wide[..., i : i + H, j : j + W]
    return _to_bytes(total / steps).reshape(images.shape)


def _normal(shape: torch.Size, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def _to_bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).byte()
