"""Images as people have them: each kind gives the pixels that it holds, and what is ambiguous is refused."""

import io
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import PROJECT
from PIL import Image

from perception.errors import DataError
from perception.inference.images import as_pixels

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.dstack([RGB, GREY])
PNG = cv2.imencode(".png", RGB[..., ::-1])[1]  # an array, as OpenCV and ROS have encoded images


def kinds():
    chw = torch.from_numpy(RGB).permute(2, 0, 1)
    grey3 = np.dstack([GREY] * 3)
    return {
        "array": (RGB, RGB), "strided": (RGB[:, ::-1], RGB[:, ::-1]), "grey": (GREY, grey3),
        "grey with a channel": (GREY[..., None], grey3), "rgba": (ALPHA, RGB), "encoded array": (PNG, RGB),
        "bytes": (PNG.tobytes(), RGB), "memoryview": (memoryview(PNG.tobytes()), RGB),
        "pillow": (Image.fromarray(RGB), RGB),
        "pillow grey": (Image.fromarray(GREY), grey3), "pillow rgba": (Image.fromarray(ALPHA), RGB),
        "palette": (Image.fromarray(GREY).convert("P"), grey3), "tensor chw": (chw, RGB),
        "tensor hwc": (torch.from_numpy(RGB), RGB), "tensor grey": (torch.from_numpy(GREY.copy()), grey3),
        "tensor 1hw": (torch.from_numpy(GREY.copy())[None], grey3),
        "tensor rgba": (torch.from_numpy(ALPHA).permute(2, 0, 1), RGB), "tensor float": (chw / 255, RGB),
        "tensor half": ((chw / 255).half(), RGB), "needs a gradient": ((chw / 255).requires_grad_(), RGB),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("wanted_bgr", [False, True])
def test_every_kind_gives_its_pixels(kind, wanted_bgr):
    image, expected = kinds()[kind]
    found = as_pixels("front", image, wanted_bgr=wanted_bgr)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected[..., ::-1] if wanted_bgr else expected)


@pytest.mark.parametrize("file", ["png", "jpg", "bmp"])
def test_files(tmp_path, file):
    path = tmp_path / f"front.{file}"
    Image.fromarray(RGB).save(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    for name in (path, str(path)):
        np.testing.assert_array_equal(as_pixels("front", name, given_bgr=True), expected)


def test_blue_first_is_of_arrays_and_tensors_only():
    bgr = np.ascontiguousarray(RGB[..., ::-1])
    for image in (bgr, np.dstack([bgr, GREY]), torch.from_numpy(bgr), torch.from_numpy(bgr).permute(2, 0, 1)):
        np.testing.assert_array_equal(as_pixels("front", image, given_bgr=True), RGB)
        np.testing.assert_array_equal(as_pixels("front", image, given_bgr=True, wanted_bgr=True), bgr)
    for image in (PNG, Image.fromarray(RGB)):
        np.testing.assert_array_equal(as_pixels("front", image, given_bgr=True), RGB)


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_that_ask_to_be_turned_are_refused(tmp_path, orientation):
    """Pillow gives the stored pixels and OpenCV turned ones: nobody knows which of them the calibration is for."""
    image = Image.fromarray(np.repeat(np.repeat(RGB, 8, 0), 8, 1))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    stored, turned = np.asarray(Image.open(tmp_path / "turned.jpg")), cv2.imread(str(tmp_path / "turned.jpg"))
    assert stored.shape != turned.shape or np.abs(stored.astype(int) - turned[..., ::-1]).mean() > 20
    for given in (tmp_path / "turned.jpg", (tmp_path / "turned.jpg").read_bytes()):
        with pytest.raises(DataError, match=f"EXIF orientation {orientation}, by which viewers and OpenCV turn"):
            as_pixels("images['front']", given)
    exif[0x0112] = 1
    image.save(tmp_path / "upright.jpg", exif=exif)
    assert as_pixels("front", tmp_path / "upright.jpg").shape == (48, 72, 3)


def refused():
    chw = torch.from_numpy(RGB).permute(2, 0, 1)
    jpeg = cv2.imencode(".jpg", np.repeat(np.repeat(RGB, 20, 0), 20, 1))[1].tobytes()
    return {
        "float array": (RGB / 255, "front is float64 .*; give RGB as a numpy array"),
        "channels first": (RGB.transpose(2, 0, 1), r"front is uint8 \(3, 6, 9\); give RGB"),
        "two channels": (RGB[..., :2], r"front is uint8 \(6, 9, 2\)"),
        "four axes": (RGB[None], r"front is uint8 \(1, 6, 9, 3\)"),
        "no pixels": (RGB[:, :0], "has no pixels"),
        "number": (3, "front is int; give RGB"),
        "no such file": ("absent.jpg", r"front, absent\.jpg, does not exist; give the file"),
        "a folder": (Path(PROJECT), "cannot be read .*Is a directory"),
        "a null byte": ("a\0b", "cannot be read"),
        "text": (b"GIF no", "front is no image that Pillow can read; give a JPEG or PNG"),
        "half a jpeg": (jpeg[: len(jpeg) // 2], "front cannot be decoded .*give a complete JPEG"),
        "16 bits": (Image.fromarray(GREY.astype(np.uint16)), "front has the mode I;16 of Pillow; convert it to 8 bits"),
        "both ends": (torch.zeros(3, 6, 3, dtype=torch.uint8), "channels may be the first axis or the last; give"),
        "no channels": (torch.zeros(5, 6, 7, dtype=torch.uint8), "without 1, 3 or 4 channels"),
        "stack": (chw[None], r"front is uint8 \(1, 3, 6, 9\)"),
        "0..255 float": (chw.float(), r"float tensor of .* to 2\d\d; give uint8 of 0\.\.255, or float of 0\.\.1"),
        "normalised": ((chw / 255 - 0.5) / 0.2, "without normalisation"),
        "NaN": (torch.full((3, 6, 9), torch.nan), "float tensor of nan"),
        "empty": (torch.zeros(3, 0, 9), "has no pixels"),
        "whole numbers": (chw.long(), "front is a tensor of int64; give uint8"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", refused())
def test_what_is_wrong_or_ambiguous_is_refused(kind):
    image, message = refused()[kind]
    with pytest.raises(DataError, match=message) as caught:
        as_pixels("front", image)
    assert "\n" not in str(caught.value)


def test_a_huge_image_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match=r"front cannot be read .*decompression bomb"):
        as_pixels("front", io.BytesIO(PNG.tobytes()).getvalue())


def test_arrays_need_neither_pillow_nor_torch():
    code = """
import sys
for name in ("torch", "PIL"):
    sys.modules[name] = None
import numpy as np
from perception.inference.images import as_pixels
print(as_pixels("front", np.zeros((4, 5), np.uint8)).shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROJECT)
    assert run.stdout.strip() == "(4, 5, 3)", run.stderr
