"""Decodes the images of ROS: sensor_msgs Image in its usual encodings, and CompressedImage."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from perception.data.loader import IMAGE_FORMATS
from perception.data.tables import MAX_PIXELS
from perception.errors import DataError
from perception.reading import nearest
from perception.recordings.recording import Image

# Channels of the encodings that are arrays of pixels, and which of them are red, green and blue.
CHANNELS = {
    "rgb": (3, (0, 1, 2)), "bgr": (3, (2, 1, 0)), "rgba": (4, (0, 1, 2)), "bgra": (4, (2, 1, 0)),
    "mono": (1, (0, 0, 0)),
}  # fmt: skip
OPENCV_TYPES = {"8UC1": "mono8", "8UC3": "bgr8", "8UC4": "bgra8", "16UC1": "mono16"}  # as cv_bridge names them
BAYER = {"bayer_rggb": (0, 0), "bayer_grbg": (0, 1), "bayer_gbrg": (1, 0), "bayer_bggr": (1, 1)}  # row, column of red
# Positions of Y U Y V in four bytes of two pixels.
YUV422 = {
    "yuv422": (1, 0, 3, 2), "uyvy": (1, 0, 3, 2), "yuv422_yuy2": (0, 1, 2, 3), "yuyv": (0, 1, 2, 3),
}  # fmt: skip
YUV420 = {"nv12": (0, 1), "nv21": (1, 0)}  # positions of U and V in a pair
ENCODINGS = (
    *(f"{kind}{bits}" for kind in CHANNELS for bits in (8, 16)), *OPENCV_TYPES,
    *(f"{kind}{bits}" for kind in BAYER for bits in (8, 16)), *YUV422, "nv12", "nv21",
)  # fmt: skip


def decode_message(message: Any, where: str) -> Image:
    """Returns the pixels of a sensor_msgs Image or CompressedImage.

    Args:
        message: as rosbags deserialises it.
        where: names the bag and the topic, for messages.

    Returns:
        [H, W, 3] uint8 RGB. Images of 16 bits keep their upper eight.

    Raises:
        DataError: the encoding is not one of `ENCODINGS`, or the data do not fit the size.
    """
    if hasattr(message, "format"):
        return _decompressed(bytes(message.data), str(message.format), where)
    encoding = OPENCV_TYPES.get(str(message.encoding), str(message.encoding).lower())
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.asarray(message.data, dtype=np.uint8)
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"{where} has an image of {width} x {height} pixels; the bag is damaged")
    if encoding in ("nv12", "nv21"):
        rows = _rows(data, height * 3 // 2, step, width, where)
        return _from_yuv420(rows, height, width, YUV420[encoding], where)
    if encoding in YUV422:
        rows = _rows(data, height, step, 2 * width, where)
        return _from_yuv422(rows, YUV422[encoding], where)
    kind, bits = (encoding[:-2], 16) if encoding.endswith("16") else (encoding[:-1], 8)
    if (bits == 8 and not encoding.endswith("8")) or kind not in (*CHANNELS, *BAYER):
        raise DataError(f"{where} has the encoding {message.encoding!r}; {nearest(str(message.encoding), ENCODINGS)}")
    channels, colors = CHANNELS.get(kind, (1, (0,)))
    rows = _rows(data, height, step, width * channels * bits // 8, where)
    if bits == 16:
        rows = rows[:, 0 if message.is_bigendian else 1 :: 2]  # the upper byte
    pixels = rows.reshape(height, width, channels)
    if kind in BAYER:
        return _demosaiced(pixels[..., 0], BAYER[kind], where)
    return np.ascontiguousarray(pixels[..., list(colors)])


def _rows(data: NDArray[np.uint8], height: int, step: int, used: int, where: str) -> NDArray[np.uint8]:
    """The rows of an image, without the bytes that fill them up to `step`."""
    if step < used or len(data) < height * step:
        raise DataError(
            f"{where} has an image with {len(data)} bytes and rows of {step}; {height} rows of {used} were expected: "
            "the bag is damaged, or the encoding is another one"
        )
    return data[: height * step].reshape(height, step)[:, :used]


def _decompressed(data: bytes, format: str, where: str) -> Image:
    if "compressedDepth" in format:
        raise DataError(f"{where} holds depth images ({format}); give the topic of a colour camera")
    try:
        with PillowImage.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            if image.mode == "I;16":
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for damaged images
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where} has an image that cannot be decoded ({reason}); copy the bag again") from None


def _from_yuv(y: Any, u: Any, v: Any) -> Image:
    """BT.601 in its studio range, as cameras and OpenCV have it."""
    y, u, v = 1.164 * (y - 16.0), u - 128.0, v - 128.0
    rgb = np.stack([y + 1.596 * v, y - 0.813 * v - 0.391 * u, y + 2.018 * u], -1)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def _from_yuv422(rows: NDArray[np.uint8], order: tuple[int, ...], where: str) -> Image:
    height, width = rows.shape[0], rows.shape[1] // 2
    if width % 2:
        raise DataError(f"{where} has a YUV 4:2:2 image with {width} columns; it must be even")
    first, u, second, v = (rows.reshape(height, width // 2, 4)[..., k].astype(np.float32) for k in order)
    y = np.stack([first, second], -1).reshape(height, width)
    return _from_yuv(y, np.repeat(u, 2, 1), np.repeat(v, 2, 1))


def _from_yuv420(rows: NDArray[np.uint8], height: int, width: int, order: tuple[int, int], where: str) -> Image:
    if height % 2 or width % 2:
        raise DataError(f"{where} has a YUV 4:2:0 image of {width} x {height} pixels; both must be even")
    y = rows[:height].astype(np.float32)
    pairs = rows[height:].reshape(height // 2, width // 2, 2).astype(np.float32)
    u, v = (pairs[..., k].repeat(2, 0).repeat(2, 1) for k in order)
    return _from_yuv(y, u, v)


def _demosaiced(mosaic: NDArray[np.uint8], red: tuple[int, int], where: str) -> Image:
    """Bilinear interpolation: a missing colour of a pixel is the mean of its neighbours that have it."""
    height, width = mosaic.shape
    if height < 2 or width < 2:
        raise DataError(f"{where} has a Bayer image of {width} x {height} pixels; it must have two rows and columns")
    row, column = (np.arange(size) % 2 for size in (height, width))
    is_red_row, is_red_column = (row == red[0])[:, None], (column == red[1])[None]
    masks = (is_red_row & is_red_column, is_red_row ^ is_red_column, ~is_red_row & ~is_red_column)
    weights = np.array([1.0, 2.0, 1.0], np.float32)
    colors = []
    for mask in masks:
        total, share = (_smoothed(part.astype(np.float32), weights) for part in (mosaic * mask, mask))
        colors.append(np.where(mask, mosaic, total / share))
    return np.clip(np.rint(np.stack(colors, -1)), 0, 255).astype(np.uint8)


def _smoothed(image: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if k == axis else (0, 0) for k in (0, 1)])
        size = image.shape[axis]
        image = sum(w * padded.take(range(k, k + size), axis) for k, w in enumerate(weights))  # type: ignore[assignment]
    return image
