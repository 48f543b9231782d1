"""Camera models: pinhole, Brown-Conrady, Kannala-Brandt fisheye, MEI and f-theta, with numpy alone.

A model projects points of the camera frame (x right, y down, z forward) to pixels, and returns the viewing ray of a
pixel. Pixels are those of the library: the centre of the first pixel is at (0.5, 0.5). OpenCV and most calibration
tools put it at (0, 0); `CameraModel.moved` adds `FROM_INTEGER_CENTERS` to such a principal point.

The polynomials of lens models are fitted inside an image and turn back outside of it, so that rays far from the optical
axis would land in the image again. Every model therefore knows the largest angle up to which its polynomial grows
(`max_angle`); outside it the result is NaN with `valid` False.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from perception.errors import DataError
from perception.rigs.lenses import Bools, Distortion, Floats, Radius

Model = TypeVar("Model", bound="CameraModel")

FROM_INTEGER_CENTERS = 0.5  # px, from pixel centres at whole numbers (OpenCV) to ours
PLANAR_LIMIT = np.radians(89.5)  # widest angle of models that divide by the depth
TOLERANCE_PX = 1e-8


class CameraModel(ABC):
    """A camera model: what all of them share.

    A subclass maps points to its own plane and back; the pixel is an affine function of that plane.
    """

    kind: ClassVar[str]  # name in rig files

    @property
    @abstractmethod
    def max_angle(self) -> float:
        """Largest angle between optical axis and ray for which the model holds, radians."""

    @property
    @abstractmethod
    def img_from_plane(self) -> Floats:
        """[3, 3] pixels from the coordinates that `_plane_from_cam` returns."""

    @property
    @abstractmethod
    def img_from_cam(self) -> Floats:
        """[3, 3] matrix of the pinhole camera that agrees with this one near the optical axis."""

    @abstractmethod
    def moved(self: Model, pixels: float) -> Model:
        """Returns the model with its principal point moved by `pixels` along both axes."""

    @abstractmethod
    def scaled(self: Model, factor: float) -> Model:
        """Returns the model of the image resized by `factor`."""

    @abstractmethod
    def _plane_from_cam(self, rays_cam: Floats) -> tuple[Floats, Bools]:
        """Maps unit rays [P, 3] to the plane [P, 2], and says which ones the model can map."""

    @abstractmethod
    def _cam_from_plane(self, plane: Floats, tolerance: float) -> tuple[Floats, Bools]:
        """Maps points of the plane [P, 2] to rays [P, 3] of any length, and says which ones the model can map."""

    def project(self, points_cam: ArrayLike) -> tuple[Floats, Bools]:
        """Projects points to pixels.

        Args:
            points_cam: [..., 3] in the camera frame; any unit, because only the direction counts.

        Returns:
            uv_img [..., 2] pixels, NaN where not valid; valid [...]: False for points outside the field of view of the
            model (`max_angle`), which says nothing about the image (see `RigCamera.project`).
        """
        points = np.asarray(points_cam, dtype=np.float64)
        shape, points = points.shape[:-1], points.reshape(-1, 3)
        with np.errstate(all="ignore"):  # invalid points are marked below
            # Scaled first: the squares of large and small coordinates would overflow or vanish.
            points = points / np.abs(points).max(-1, keepdims=True)
            rays = points / np.linalg.norm(points, axis=-1, keepdims=True)
            plane, valid = self._plane_from_cam(rays)
            valid = valid & (angles(rays) <= self.max_angle)
            matrix = self.img_from_plane
            uv = plane @ matrix[:2, :2].T + matrix[:2, 2]
            valid &= np.isfinite(uv).all(-1)
        uv[~valid] = np.nan
        return uv.reshape(*shape, 2), valid.reshape(shape)

    def unproject(self, uv_img: ArrayLike) -> tuple[Floats, Bools]:
        """Returns the viewing rays of pixels.

        Args:
            uv_img: [..., 2] pixels; they may lie outside the image.

        Returns:
            rays_cam [..., 3] of length 1, NaN where not valid; valid [...]: False where no ray inside the field of view
            of the model leads to this pixel. Projecting a valid ray gives the pixel again, to 1e-6 px.
        """
        uv = np.asarray(uv_img, dtype=np.float64)
        shape, uv = uv.shape[:-1], uv.reshape(-1, 2)
        with np.errstate(all="ignore"):
            matrix = self.img_from_plane
            plane = np.matmul(uv - matrix[:2, 2], np.linalg.inv(matrix[:2, :2]).T)
            rays, valid = self._cam_from_plane(plane, TOLERANCE_PX / np.abs(matrix[:2, :2]).max())
            rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
            valid = valid & np.isfinite(rays).all(-1) & (angles(rays) <= self.max_angle)
        rays[~valid] = np.nan
        return rays.reshape(*shape, 3), valid.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class _FocalModel(CameraModel):
    """A model whose plane has focal lengths.

    Attributes:
        fx, fy: focal lengths, pixels.
        cx, cy: principal point, pixels; the centre of the first pixel is at 0.5.
        skew: pixels that u grows with y, as in the matrix fx skew cx, 0 fy cy, 0 0 1.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    skew: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.fx, self.fy, self.cx, self.cy, self.skew)
        if not np.isfinite(numbers).all() or min(self.fx, self.fy) <= 0:
            raise DataError(
                f"fx, fy, cx, cy, skew of the {self.kind} model are {', '.join(f'{x:g}' for x in numbers)}; give "
                "finite numbers of pixels and focal lengths above 0"
            )

    @property
    def img_from_plane(self) -> Floats:
        return np.array([[self.fx, self.skew, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    @property
    def img_from_cam(self) -> Floats:
        return self.img_from_plane

    def moved(self: Any, pixels: float) -> Any:
        return replace(self, cx=self.cx + pixels, cy=self.cy + pixels)

    def scaled(self: Any, factor: float) -> Any:
        return replace(self, **{key: factor * getattr(self, key) for key in ("fx", "fy", "cx", "cy", "skew")})


@dataclass(frozen=True, kw_only=True)
class Pinhole(_FocalModel):
    """A pinhole camera without distortion."""

    kind: ClassVar[str] = "pinhole"

    @property
    def max_angle(self) -> float:
        return float(PLANAR_LIMIT)

    def _plane_from_cam(self, rays_cam: Floats) -> tuple[Floats, Bools]:
        return rays_cam[:, :2] / rays_cam[:, 2:], np.asarray(rays_cam[:, 2] > 0)

    def _cam_from_plane(self, plane: Floats, tolerance: float) -> tuple[Floats, Bools]:
        return _lifted(plane), np.ones(len(plane), bool)


@dataclass(frozen=True, kw_only=True)
class BrownConrady(_FocalModel):
    """A pinhole camera with the distortion of Brown and Conrady, as in OpenCV (`plumb_bob`, `rational_polynomial`).

    Attributes:
        distortion: 4, 5, 8 or 12 coefficients in OpenCV's order: k1 k2 p1 p2, k3, k4 k5 k6, s1 s2 s3 s4 (thin prism).
    """

    distortion: tuple[float, ...]
    kind: ClassVar[str] = "brown_conrady"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_coefficients(self, "distortion", (4, 5, 8, 12))

    @cached_property
    def _lens(self) -> Distortion:
        return Distortion(self.distortion, float(np.tan(PLANAR_LIMIT)))

    @property
    def max_angle(self) -> float:
        return float(np.arctan(self._lens.max_radius))

    def _plane_from_cam(self, rays_cam: Floats) -> tuple[Floats, Bools]:
        plane, valid = self._lens.distort(rays_cam[:, :2] / rays_cam[:, 2:])
        return plane, valid & (rays_cam[:, 2] > 0)

    def _cam_from_plane(self, plane: Floats, tolerance: float) -> tuple[Floats, Bools]:
        undistorted, valid = self._lens.undistort(plane, tolerance)
        return _lifted(undistorted), valid


@dataclass(frozen=True, kw_only=True)
class Mei(_FocalModel):
    """The unified omnidirectional model of Mei and Rives (ICRA 2007): a unit sphere, a shifted centre, and distortion.

    A unit ray (x, y, z) is mapped to (x, y) / (z + xi), distorted as by Brown and Conrady, and scaled by fx and fy
    (gamma of the paper). It is Kalibr's `omni` and the fisheye model of KITTI-360.

    Attributes:
        xi: shift of the projection centre, at least 0.
        distortion: 4 or 5 coefficients k1 k2 p1 p2, k3.
    """

    xi: float
    distortion: tuple[float, ...]
    kind: ClassVar[str] = "mei"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (np.isfinite(self.xi) and self.xi >= 0):
            raise DataError(f"xi of the mei model is {self.xi:g}; give a finite number of at least 0")
        _check_coefficients(self, "distortion", (4, 5))

    @cached_property
    def _lens(self) -> Distortion:
        # Beyond a xi of 1 the rays behind the sphere's outline fold back into the image: cos(angle) > -1 / xi.
        limit = np.pi - 1e-3 if self.xi <= 1 else np.arccos(-1 / self.xi) - 1e-3
        if self.xi < 1:  # the denominator z + xi vanishes
            limit = min(limit, np.arccos(-self.xi) - np.pi / 2 + PLANAR_LIMIT)
        return Distortion(self.distortion, float(np.sin(limit) / (np.cos(limit) + self.xi)))

    @cached_property
    def max_angle(self) -> float:
        ray = self._cam_from_mirror(np.array([[self._lens.max_radius, 0.0]]))
        return float(angles(ray)[0])

    @property
    def img_from_cam(self) -> Floats:
        return np.asarray(self.img_from_plane @ np.diag([1 / (1 + self.xi), 1 / (1 + self.xi), 1.0]))

    def _plane_from_cam(self, rays_cam: Floats) -> tuple[Floats, Bools]:
        depth = rays_cam[:, 2:] + self.xi
        plane, valid = self._lens.distort(rays_cam[:, :2] / depth)
        return plane, valid & (depth[:, 0] > 0)

    def _cam_from_plane(self, plane: Floats, tolerance: float) -> tuple[Floats, Bools]:
        mirror, valid = self._lens.undistort(plane, tolerance)
        return self._cam_from_mirror(mirror), valid

    def _cam_from_mirror(self, mirror: Floats) -> Floats:
        square = (mirror**2).sum(-1)
        scale = (self.xi + np.sqrt(1 + (1 - self.xi**2) * square)) / (1 + square)
        return np.concatenate([mirror * scale[:, None], (scale - self.xi)[:, None]], -1)


@dataclass(frozen=True, kw_only=True)
class KannalaBrandt(_FocalModel):
    """The fisheye model of Kannala and Brandt, as in OpenCV's `fisheye` module (ROS: `equidistant`).

    The image radius is fx * (t + k1 t^3 + k2 t^5 + k3 t^7 + k4 t^9) for a ray at an angle of t radians. Unlike OpenCV's
    functions it covers rays behind the camera.

    Attributes:
        distortion: k1 k2 k3 k4.
    """

    distortion: tuple[float, ...]
    kind: ClassVar[str] = "kannala_brandt"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_coefficients(self, "distortion", (4,))

    @cached_property
    def _radius(self) -> Radius:
        k1, k2, k3, k4 = self.distortion
        return Radius((1, 0, k1, 0, k2, 0, k3, 0, k4))

    @property
    def max_angle(self) -> float:
        return self._radius.max_angle

    def _plane_from_cam(self, rays_cam: Floats) -> tuple[Floats, Bools]:
        return self._radius.plane_from_cam(rays_cam)

    def _cam_from_plane(self, plane: Floats, tolerance: float) -> tuple[Floats, Bools]:
        return self._radius.cam_from_plane(plane, tolerance)


@dataclass(frozen=True, kw_only=True)
class FTheta(CameraModel):
    """A fisheye whose image radius is a polynomial of the angle from the optical axis (f-theta).

    Attributes:
        cx, cy: principal point, pixels; the centre of the first pixel is at 0.5.
        polynomial: coefficients a1 a2 ... of the radius a1 t + a2 t^2 + ... in pixels, for an angle of t radians.
    """

    cx: float
    cy: float
    polynomial: tuple[float, ...]
    kind: ClassVar[str] = "f_theta"

    def __post_init__(self) -> None:
        if not np.isfinite((self.cx, self.cy)).all():
            raise DataError(f"cx, cy of the f_theta model are {self.cx:g}, {self.cy:g}; give finite numbers of pixels")
        _check_coefficients(self, "polynomial", tuple(range(1, 10)))
        if self.polynomial[0] <= 0:
            raise DataError(
                f"polynomial of the f_theta model begins with {self.polynomial[0]:g} pixels per radian; give the "
                "coefficients from the first power on, and a first one above 0"
            )

    @cached_property
    def _radius(self) -> Radius:
        return Radius(self.polynomial)

    @property
    def max_angle(self) -> float:
        return self._radius.max_angle

    @property
    def img_from_plane(self) -> Floats:
        return np.array([[1.0, 0.0, self.cx], [0.0, 1.0, self.cy], [0.0, 0.0, 1.0]])

    @property
    def img_from_cam(self) -> Floats:
        focal = self.polynomial[0]
        return np.array([[focal, 0.0, self.cx], [0.0, focal, self.cy], [0.0, 0.0, 1.0]])

    def moved(self: Any, pixels: float) -> Any:
        return replace(self, cx=self.cx + pixels, cy=self.cy + pixels)

    def scaled(self: Any, factor: float) -> Any:
        polynomial = tuple(factor * a for a in self.polynomial)
        return replace(self, cx=factor * self.cx, cy=factor * self.cy, polynomial=polynomial)

    def _plane_from_cam(self, rays_cam: Floats) -> tuple[Floats, Bools]:
        return self._radius.plane_from_cam(rays_cam)

    def _cam_from_plane(self, plane: Floats, tolerance: float) -> tuple[Floats, Bools]:
        return self._radius.cam_from_plane(plane, tolerance)


MODELS: dict[str, type[CameraModel]] = {
    model.kind: model for model in (Pinhole, BrownConrady, KannalaBrandt, Mei, FTheta)
}


def _check_coefficients(model: CameraModel, name: str, counts: tuple[int, ...]) -> None:
    """Keeps the coefficients as a tuple of floats, so that models compare and hash, and checks them."""
    values = tuple(float(value) for value in getattr(model, name))
    object.__setattr__(model, name, values)  # the model is frozen
    if len(values) not in counts or not np.isfinite(values).all():
        *first, last = map(str, counts)
        wanted = f"{', '.join(first)} or {last}" if first else last
        raise DataError(
            f"{name} of the {model.kind} model has {len(values)} coefficients ({', '.join(f'{x:g}' for x in values)}); "
            f"give {wanted} finite numbers"
        )


def angles(points_cam: Floats) -> Floats:
    """Angles [...] between the optical axis and rays to points [..., 3] of the camera frame, radians."""
    return np.asarray(np.arctan2(np.hypot(points_cam[..., 0], points_cam[..., 1]), points_cam[..., 2]))


def _lifted(plane: Floats) -> Floats:
    return np.concatenate([plane, np.ones((len(plane), 1))], -1)
