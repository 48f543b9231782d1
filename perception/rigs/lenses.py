"""Lens distortion and its inverse: a radius that is a polynomial of the angle, and that of Brown and Conrady.

Both know up to where they can be inverted, and find the inverse by Newton's method from a table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# A polynomial has no slope where it turns back, and no pixel has a precise ray there: stop just before.
BEFORE_TURN = 0.999
TABLE = 1024  # entries of the table with the first guesses
ITERATIONS = 10  # of Newton's method; from the table it needs three or four
STEP = 1e-12  # a step below it is the last one, because Newton's method squares the error


class Radius:
    """A radius that is a polynomial of the angle from the optical axis."""

    def __init__(self, coefficients: tuple[float, ...]) -> None:
        self._polynomial = np.poly1d((*reversed(coefficients), 0.0))
        self._slope = self._polynomial.deriv()
        self.max_angle = min(np.pi - 1e-6, BEFORE_TURN * _first_positive_root(self._slope))
        self._angles = np.linspace(0, self.max_angle, TABLE)
        self._radii = self._polynomial(self._angles)

    def plane_from_cam(self, rays_cam: Floats) -> tuple[Floats, Bools]:
        sine = np.hypot(rays_cam[:, 0], rays_cam[:, 1])
        angle = np.arctan2(sine, rays_cam[:, 2])
        # Near the axis the ratio of radius and sine is the first coefficient.
        ratio = np.where(sine > 1e-12, self._polynomial(angle) / sine, self._slope(0.0))
        return rays_cam[:, :2] * ratio[:, None], np.ones(len(rays_cam), bool)

    def cam_from_plane(self, plane: Floats, tolerance: float) -> tuple[Floats, Bools]:
        radius = np.linalg.norm(plane, axis=-1)
        angle = np.interp(radius, self._radii, self._angles)
        for _ in range(ITERATIONS):
            step = (self._polynomial(angle) - radius) / self._slope(angle)
            angle = np.clip(angle - step, 0, self.max_angle)
            if not (np.abs(step) > STEP).any():
                break
        valid = np.abs(self._polynomial(angle) - radius) <= tolerance + 1e-15 * radius
        direction = np.where(radius[:, None] > 0, plane / radius[:, None], 0.0)
        return np.concatenate([direction * np.sin(angle)[:, None], np.cos(angle)[:, None]], -1), valid


class Distortion:
    """The distortion of Brown and Conrady on the plane at depth 1, and its inverse.

    Args:
        coefficients: 4, 5, 8 or 12 in OpenCV's order.
        limit: largest radius of undistorted points.
    """

    def __init__(self, coefficients: tuple[float, ...], limit: float) -> None:
        k1, k2, p1, p2, k3, k4, k5, k6, *prism = (*coefficients, *[0.0] * (12 - len(coefficients)))
        self._numerator, self._denominator = np.poly1d((k3, k2, k1, 1)), np.poly1d((k6, k5, k4, 1))
        self._numerator_slope, self._denominator_slope = self._numerator.deriv(), self._denominator.deriv()
        self._p, self._s = (p1, p2), prism
        # r * N(s) / D(s) with s = r^2 grows where (N + 2 s N') D - 2 s N D' is positive.
        twice_s = np.poly1d((2, 0))
        growth = (self._numerator + twice_s * self._numerator_slope) * self._denominator
        growth = growth - twice_s * self._numerator * self._denominator_slope
        turn = min(_first_positive_root(growth), _first_positive_root(self._denominator))
        self.max_radius = float(min(limit, BEFORE_TURN * np.sqrt(turn)))
        self.max_radius = self._largest_disc()
        self._radii = np.tan(np.linspace(0, np.arctan(self.max_radius), TABLE))  # denser near the centre
        self._distorted_radii = self._radii * self._factor(self._radii**2)[0]

    def _factor(self, square: Floats) -> tuple[Floats, Floats]:
        """The radial factor and its derivative by the squared radius."""
        numerator, denominator = self._numerator(square), self._denominator(square)
        slope = self._numerator_slope(square) * denominator - numerator * self._denominator_slope(square)
        return numerator / denominator, slope / denominator**2

    def _map(self, plane: Floats) -> tuple[Floats, tuple[Floats, Floats, Floats, Floats]]:
        """Distorts points [P, 2]; also returns the Jacobian xx, xy, yx, yy."""
        (p1, p2), (s1, s2, s3, s4) = self._p, self._s
        x, y = plane.T
        square = x * x + y * y
        factor, slope = self._factor(square)
        distorted_x = x * factor + 2 * p1 * x * y + p2 * (square + 2 * x * x) + (s1 + s2 * square) * square
        distorted_y = y * factor + p1 * (square + 2 * y * y) + 2 * p2 * x * y + (s3 + s4 * square) * square
        prism_x, prism_y = 2 * (s1 + 2 * s2 * square), 2 * (s3 + 2 * s4 * square)
        cross = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y
        jacobian = (
            factor + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x + prism_x * x,
            cross + prism_x * y,
            cross + prism_y * x,
            factor + 2 * y * y * slope + 6 * p1 * y + 2 * p2 * x + prism_y * y,
        )
        return np.stack([distorted_x, distorted_y], -1), jacobian

    def _largest_disc(self) -> float:
        """The radius up to which nothing turns back: tangential and prism terms may do so before the radial ones."""
        radii = np.tan(np.linspace(0, np.arctan(self.max_radius), TABLE))
        azimuth = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        disc = radii[:, None, None] * np.stack([np.cos(azimuth), np.sin(azimuth)], -1)  # [TABLE, 72, 2]
        xx, xy, yx, yy = self._map(disc.reshape(-1, 2))[1]
        turned = ~(xx * yy - xy * yx > 0).reshape(TABLE, -1).all(-1)
        return float(radii[max(turned.argmax() - 1, 0)] if turned.any() else self.max_radius)

    def _in_disc(self, plane: Floats) -> Bools:
        return np.asarray(np.linalg.norm(plane, axis=-1) <= self.max_radius * (1 + 1e-12))

    def distort(self, plane: Floats) -> tuple[Floats, Bools]:
        return self._map(plane)[0], self._in_disc(plane)

    def undistort(self, distorted: Floats, tolerance: float) -> tuple[Floats, Bools]:
        radius = np.linalg.norm(distorted, axis=-1)
        start = np.interp(radius, self._distorted_radii, self._radii)  # the inverse without tangential distortion
        plane = np.where(radius[:, None] > 0, distorted / radius[:, None], 0.0) * start[:, None]
        todo = np.arange(len(plane))
        for _ in range(ITERATIONS):
            current, (xx, xy, yx, yy) = self._map(plane[todo])
            (dx, dy), determinant = (current - distorted[todo]).T, xx * yy - xy * yx
            step = np.stack([yy * dx - xy * dy, xx * dy - yx * dx], -1) / determinant[:, None]
            moved = plane[todo] - step
            # A step out of the field of view goes to its border; a point beyond stays there and is not valid.
            outside = np.linalg.norm(moved, axis=-1) / self.max_radius
            plane[todo] = moved / np.maximum(outside, 1)[:, None]
            todo = todo[np.abs(step).max(-1) > STEP]
            if not len(todo):
                break
        found = np.abs(self._map(plane)[0] - distorted).max(-1) <= tolerance + 1e-15 * radius
        return plane, found & self._in_disc(plane)


def _first_positive_root(polynomial: np.poly1d) -> float:
    """The smallest positive root of a polynomial; infinite if there is none."""
    roots = np.roots(polynomial.coeffs)
    real = roots.real[(np.abs(roots.imag) <= 1e-9 * np.abs(roots)) & (roots.real > 1e-12)]
    return float(real.min()) if len(real) else np.inf
