"""Reads single fields of info files: flags, matrices, poses and calibrations."""

from __future__ import annotations

import numpy as np

from perception.errors import DataError
from perception.inference.checks import checked_rigid
from perception.reading import number, short


def read_flag(value: object, where: str) -> bool:
    """Reads true or false, also as 1 or 0."""
    if not isinstance(value, bool | np.bool_) and not (isinstance(value, int | np.integer) and value in (0, 1)):
        raise DataError(f"{where} is {short(value)}; it must be true or false")
    return bool(value)


def read_matrix(value: object, where: str, *shapes: tuple[int, int]) -> np.ndarray:
    """Reads a matrix of finite numbers of one of several shapes."""
    rows = value if isinstance(value, list | tuple | np.ndarray) else ()
    for height, width in shapes:
        # Lengths are compared before anything is converted: a pickle can nest lists without end in few bytes.
        if len(rows) == height and all(isinstance(r, list | tuple | np.ndarray) and np.ndim(r[:0]) == 1 for r in rows):
            if all(len(row) == width for row in rows):
                matrix = np.array([[number(x) for x in row] for row in rows])
                if np.isfinite(matrix).all():
                    return matrix
    wanted = " or ".join(f"{height} x {width}" for height, width in shapes)
    raise DataError(f"{where} must be {wanted} finite numbers; it is {short(value)}")


def read_rigid(value: object, where: str) -> np.ndarray:
    """Reads a rigid transform [4, 4]."""
    return checked_rigid(where, read_matrix(value, where, (4, 4)))


def read_pinhole(value: object, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a projection [3, 3], [3, 4] or [4, 4].

    Returns:
        img_from_cam [3, 3], and the offset [4, 4] of the camera's axes that KITTI puts into the last column.
    """
    matrix = read_matrix(value, where, (3, 3), (3, 4), (4, 4))
    if len(matrix) == 4 and (matrix[3] != (0, 0, 0, 1)).any():
        raise DataError(f"{where} has {short(matrix[3].tolist())} as its last row; give 0 0 0 1")
    img_from_cam, offset = matrix[:3, :3], np.eye(4)
    if matrix.shape[1] == 4 and matrix[:3, 3].any():
        try:
            offset[:3, 3] = np.linalg.solve(img_from_cam, matrix[:3, 3])
        except np.linalg.LinAlgError:
            raise DataError(f"{where} is not a pinhole calibration; give fx 0 cx, 0 fy cy, 0 0 1") from None
    return img_from_cam, offset
