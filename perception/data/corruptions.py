"""Camera faults: a missing camera, wrong extrinsics, corrupted images.

These are pure functions on a Frame with any leading dimensions. They leave the world, and so the ground truth, alone.
Training uses them (`perception.data.augment`), and so does the robustness card (`perception.evaluation.robustness`).

The kinds of image corruption are those of RoboBEV (Xie et al., https://arxiv.org/abs/2405.17426) that have a closed
form and need no recorded pictures: bright, dark, fog, motion blur, colour quantisation. Sensor noise comes from
Hendrycks and Dietterich (https://arxiv.org/abs/1807.01697) and Dong et al. (https://arxiv.org/abs/2303.11040).
Formulas and levels are defined below and differ from those papers, so results are not comparable with theirs.
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

# Level of each kind at the three severities.
CORRUPTIONS = {
    "bright": (0.2, 0.35, 0.5),  # share of full white added to every pixel, saturating
    "dark": (0.7, 0.5, 0.3),  # brightness of white after x -> level * x^2; photon noise is added
    "fog": (0.65, 0.45, 0.3),  # share of the light that is transmitted
    "blur": (0.01, 0.02, 0.03),  # length of the motion blur, in image widths
    "noise": (0.08, 0.12, 0.18),  # standard deviation in each pixel and channel, as a share of full white
    "quantize": (4, 3, 2),  # bits kept of eight
}
PHOTONS = 300.0  # photons per white pixel of a well lit image; shot noise is the square root of the count
FOG_COLOR = 225.0  # of 255
FOG_PATCHES = (4, 7)  # patches of thinner and thicker fog over the height and the width of an image


def drop_camera(frame: Frame, camera: int) -> Frame:
    """Marks one camera of a frame as not present and makes its image black.

    Args:
        frame: with leading [...].
        camera: index of the camera, 0 to N - 1.
    """
    images, present = frame.images.clone(), frame.rig.present.clone()
    images[..., camera, :, :, :] = 0
    present[..., camera] = False
    return frame._replace(images=images, rig=frame.rig._replace(present=present))


def droppable_cameras(rig: CameraRig) -> list[int]:
    """Lists the cameras that are present and can be dropped while every frame of [..., N] keeps at least one camera."""
    present = rig.present.flatten(0, -2)  # [frames, N]
    only = present & (present.sum(-1, keepdim=True) == 1)
    return torch.nonzero(present.any(0) & ~only.any(0))[:, 0].tolist()


def rotate_extrinsics(frame: Frame, rotations: np.ndarray) -> Frame:
    """Adds a rotation error to the extrinsics: the poses turn about the camera centres, the images stay.

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
    """Builds the matrices [..., 3, 3] whose products with a vector are cross products with the given [..., 3]."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def perturb_extrinsics(frame: Frame, max_deg: float, rng: np.random.Generator) -> Frame:
    """Adds to each camera's extrinsics an independent yaw error, uniform within plus and minus `max_deg`."""
    yaw = np.radians(rng.uniform(-max_deg, max_deg, frame.rig.present.shape[-1]))
    return rotate_extrinsics(frame, yaw[:, None] * np.array([0.0, 0.0, 1.0]))


def yaw_extrinsics(frame: Frame, degrees: float, rng: np.random.Generator) -> Frame:
    """Adds to each camera's extrinsics a yaw error of exactly `degrees`, of random sign."""
    signs = rng.choice([-1.0, 1.0], frame.rig.present.shape[-1])
    return rotate_extrinsics(frame, np.radians(degrees) * signs[:, None] * np.array([0.0, 0.0, 1.0]))


def as_first_frame(frame: Frame) -> Frame:
    """Marks a frame as the first of a scene: the network ignores its memory, and there is no ego motion."""
    eye = torch.eye(4, dtype=frame.ego_from_prev.dtype).expand_as(frame.ego_from_prev)
    return frame._replace(
        ego_from_prev=eye.to(frame.ego_from_prev.device),
        seconds_since_prev=torch.zeros_like(frame.seconds_since_prev),
        is_first=torch.ones_like(frame.is_first),
    )


def corrupt_camera(frame: Frame, camera: int, kind: str, severity: int, rng: np.random.Generator) -> Frame:
    """Corrupts the images of one camera; frames in which the camera is missing stay unchanged.

    Args:
        frame: with leading [...] and uint8 images; fog and blur direction are the same in all its frames.
        camera: index of the camera, 0 to N - 1.
        kind, severity, rng: as in `corrupt_images`.
    """
    images = frame.images.clone()
    old = images[..., camera, :, :, :]
    new = corrupt_images(old, kind, severity, rng)
    images[..., camera, :, :, :] = torch.where(frame.rig.present[..., camera, None, None, None], new, old)
    return frame._replace(images=images)


def corrupt_images(images: Tensor, kind: str, severity: int, rng: np.random.Generator) -> Tensor:
    """Corrupts images as a faulty camera, bad light or bad weather would.

    Args:
        images: [..., 3, H, W] uint8.
        kind: a key of `CORRUPTIONS`.
        severity: 1, 2 or 3.
        rng: source of all randomness.

    Returns:
        Images [..., 3, H, W] uint8.

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
        return images & (256 - 2 ** (8 - int(level)))
    if kind == "fog":
        return _fog(images, level, rng)
    return _smear(images, images.shape[-1] * level, math.radians(rng.uniform(-45.0, 45.0)))


def _fog(images: Tensor, through: float, rng: np.random.Generator) -> Tensor:
    """Applies Koschmieder's law, light * through + fog * (1 - through), with thickness 0.5 to 1.5 over the image."""
    thickness = torch.from_numpy(rng.uniform(0.5, 1.5, (1, 1, *FOG_PATCHES)).astype(np.float32))
    thickness = F.interpolate(thickness, size=images.shape[-2:], mode="bilinear", align_corners=True)[0, 0]  # [H, W]
    return _to_bytes(torch.lerp(torch.tensor(FOG_COLOR), images.float(), through**thickness))


def _smear(images: Tensor, length_px: float, angle: float) -> Tensor:
    """Averages shifted copies of the image along a straight segment, centred at no shift, in steps of about a pixel.

    Shifts are whole pixels, which is many times faster than a convolution with a long kernel.
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
