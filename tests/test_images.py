"""Image preprocessing: sizes, formats and colours, in the graph and on the host."""

from functools import cache

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import RAW
from PIL import Image
from torch import nn

from perception.errors import ConfigError, DataError
from perception.export.contract import IMAGE_FORMATS, ImageInputs
from perception.export.dialect import check_dialect
from perception.export.images import ImagePreprocessing, from_rgb, to_rgb
from perception.export.lowering import OPSET, lower_graph
from perception.export.onnx import trace
from perception.export.tensorrt import parse_graph
from perception.inference.fitting import fit_image, fit_pixels, fitting_matrices

SIZE = (40, 80)  # of the network
SIZES = ((64, 112), (64, 112), SIZE, (90, 160))  # of the cameras


class Pixels(nn.Module):
    """The image preprocessing of an exported graph."""

    def __init__(self, images):
        super().__init__()
        self.preprocess = ImagePreprocessing(images, SIZE)
        self.input_names, self.output_names = images.names, ("pixels",)

    def forward(self, images):
        return self.preprocess(images)


@pytest.fixture(scope="module")
def graphs():
    """Graphs for images of SIZES, by format."""

    @cache
    def make(image_format):
        images = ImageInputs(SIZES, image_format)
        buffers = tuple(torch.zeros(images.shape(n), dtype=torch.uint8) for n in range(len(SIZES)))
        return lower_graph(trace(Pixels(images).eval(), (buffers,)), OPSET).SerializeToString()

    return make


def closed_form(image, red, blue, full_range):
    """Converts NV12 to RGB by the definition of Y, Cb and Cr in float64; red and blue are their weights in the luma."""
    H = len(image) * 2 // 3
    chroma = np.repeat(np.repeat(image[H:].reshape(H // 2, -1, 2), 2, 0), 2, 1).astype(float)
    luma = np.maximum(image[:H].astype(float) - (0 if full_range else 16), 0) / (255 if full_range else 219)
    cb, cr = ((chroma[..., k] - 128) / (255 if full_range else 224) for k in (0, 1))  # -0.5..0.5
    R, B = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    G = (luma - red * R - blue * B) / (1 - red - blue)
    return (np.stack([R, G, B], -1) * 255).clip(0, 255)


def test_images_are_fitted_as_in_training():
    generator = np.random.default_rng(0)
    sizes = (
        ((90, 160), (40, 80)),
        (RAW, (40, 80)),
        ((30, 50), (40, 80)),
        ((40, 80), (40, 80)),
        ((225, 400), (44, 112)),
    )
    for raw, size in sizes:
        image = generator.integers(0, 256, (*raw, 3), dtype=np.uint8)
        matrix = np.array([[60.0, 0, 50], [0, 61, 30], [0, 0, 1]])
        wanted, wanted_matrix = fit_image(Image.fromarray(image), matrix, size)
        rows, columns, img_from_raw = fitting_matrices(raw, size)
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()[None]
        found = fit_pixels(pixels, rows, columns)
        assert torch.equal(found[0], wanted.float())
        assert (img_from_raw.double().numpy() @ matrix) == pytest.approx(wanted_matrix, abs=1e-4)


@pytest.mark.parametrize("image_format", ["rgb", "bgr", "rgb-chw", "nv12", "nv12-709-er"])
def test_a_graph_reads_cameras_of_several_sizes(graphs, image_format):
    """Bit-identical to colour conversion by numpy or OpenCV and resizing by Pillow."""
    generator = np.random.default_rng(1)
    images = ImageInputs(SIZES, image_format)
    buffers = [generator.integers(0, 256, images.shape(n), dtype=np.uint8) for n in range(len(SIZES))]
    session = onnxruntime.InferenceSession(graphs(image_format), providers=["CPUExecutionProvider"])
    found = session.run(None, dict(zip(images.names, buffers, strict=True)))[0]
    to = {
        "rgb": lambda image: image,
        "bgr": lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
        "rgb-chw": lambda image: np.stack(list(image), -1),
        "nv12": lambda image: cv2.cvtColor(image, cv2.COLOR_YUV2RGB_NV12),
        "nv12-709-er": lambda image: to_rgb(image, image_format),  # OpenCV has none
    }[image_format]
    for n, buffer in enumerate(buffers):
        wanted = fit_image(Image.fromarray(to(buffer)), np.eye(3), SIZE)[0]
        assert np.array_equal(found[n], wanted.float().numpy()), n


def test_all_formats_give_the_same_network_image():
    generator = np.random.default_rng(2)
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    wanted = Pixels(ImageInputs(SIZES))([torch.from_numpy(picture) for picture in pictures])
    for image_format in IMAGE_FORMATS:
        images = ImageInputs(SIZES, image_format)
        given = [from_rgb(picture, image_format) for picture in pictures]
        assert [image.shape for image in given] == [images.shape(n) for n in range(len(SIZES))]
        if images.is_nv12:  # loses colour resolution
            seen = [torch.from_numpy(to_rgb(image, image_format)) for image in given]
            wanted_here = Pixels(ImageInputs(SIZES))(seen)
        else:
            wanted_here = wanted
        found = Pixels(images)([torch.from_numpy(image) for image in given])
        assert torch.equal(found, wanted_here), image_format


def test_colors_of_nv12():
    """Bit-identical to OpenCV for its format, within one grey value of BT.601 and BT.709, and reversible."""
    image = np.random.default_rng(3).integers(0, 256, (96, 640), dtype=np.uint8)
    assert np.array_equal(to_rgb(image, "nv12"), cv2.cvtColor(image, cv2.COLOR_YUV2RGB_NV12))
    shares = {"nv12": (0.299, 0.114), "nv12-709": (0.2126, 0.0722)}
    for image_format in ("nv12", "nv12-er", "nv12-709", "nv12-709-er"):
        red, blue = shares[image_format.removesuffix("-er")]
        wanted = closed_form(image, red, blue, image_format.endswith("er"))
        assert np.abs(to_rgb(image, image_format) - wanted).max() < (0.7 if image_format == "nv12" else 0.51)
        picture = np.repeat(np.repeat(np.random.default_rng(4).integers(0, 256, (8, 8, 3), np.uint8), 2, 0), 2, 1)
        again = to_rgb(from_rgb(picture, image_format), image_format)
        assert np.abs(again.astype(int) - picture).max() <= 3
    planar = cv2.cvtColor(picture, cv2.COLOR_RGB2YUV_I420).reshape(-1)
    luma, chroma = planar[:256].reshape(16, 16), planar[256:].reshape(2, 8, 8).transpose(1, 2, 0).reshape(8, 16)
    assert np.abs(from_rgb(picture, "nv12").astype(int) - np.concatenate([luma, chroma])).max() <= 1


@pytest.mark.parametrize("image_format", ["bgr", "rgb-chw", "nv12"])
def test_tensorrt_takes_every_format(graphs, image_format, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "model.onnx"
    path.write_bytes(graphs(image_format))
    check_dialect(onnx.load(path))
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network, _parser = parse_graph(trt, builder, logger, path, "tensorrt-rtx")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None


def test_invalid_sizes_and_formats_are_named():
    assert ImageInputs.of_rig(2, SIZE).sizes == (SIZE, SIZE)
    assert ImageInputs.of_rig(2, SIZE, (64, 112)).sizes == ((64, 112),) * 2
    assert ImageInputs.of_rig(2, SIZE, [(64, 112), [90, 160]]).sizes == ((64, 112), (90, 160))
    for raw_size, image_format, message in (
        (
            (64, 112, 3),
            "rgb",
            r"raw size \(64, 112, 3\) is not \(height, width\) in pixels, nor one such pair per camera",
        ),
        ((64, 112.5), "rgb", "is not .height, width."),
        (((64, 112), (90,)), "rgb", "is not .height, width."),
        ("64x112", "rgb", "raw size '64x112' is not"),
        (((64, 112),) * 3, "rgb", "3 raw sizes were given for 2 cameras; give one for all, or one for each"),
        ((64, -112), "rgb", "raw size of camera 0 is 64x-112; give height and width from 1 to 16384 pixels"),
        (((64, 112), (20000, 112)), "rgb", "raw size of camera 1 is 20000x112; give"),
        ((65, 112), "nv12", "raw size of camera 0 is 65x112; nv12 needs even numbers"),
        (None, "yuy2", "image format 'yuy2' is not known; use one of rgb, bgr, rgb-chw, bgr-chw, nv12, "),
    ):
        with pytest.raises(ConfigError, match=message):
            ImageInputs.of_rig(2, SIZE, raw_size, image_format)
    with pytest.raises(ConfigError, match="cameras is 0; give at least 1"):
        ImageInputs.of_rig(0, SIZE)
    images = ImageInputs(SIZES, "nv12")
    with pytest.raises(
        DataError, match=r"images\[3\] is uint8 \(96, 112\); .* nv12 of 90 x 160 .*: give uint8 \(135, 160\)"
    ):
        images.checked(3, np.zeros((96, 112), np.uint8))
    with pytest.raises(DataError, match=r"images\[1\] is list; the network was exported for nv12 of 64 x 112 pixels"):
        images.checked(1, [])
