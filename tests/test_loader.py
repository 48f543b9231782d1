"""Image decoding against images with known content; padding, collation and sampling orders."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from perception.data import loader
from perception.data.augment import Augment
from perception.data.loader import (
    ClipRequest,
    SceneStreamSampler,
    TrainSampler,
    collate,
    decode_image,
    pad_boxes,
    pad_lines,
)
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError, DataError
from perception.inference.fitting import fit_image
from perception.models.decoding import empty_boxes
from perception.types import MapLine, map_tensors


def test_boxes_of_several_frames_are_padded_to_the_most():
    def some(count):
        return map_tensors(lambda x: torch.ones(count, *x.shape[2:], dtype=x.dtype), empty_boxes(1, "cpu"))

    assert pad_boxes([some(0)]).center.shape == (1, 0, 3)
    assert pad_boxes([some(1), some(2)]).valid.tolist() == [[True, False], [True, True]]
    assert pad_boxes([some(1)], 3).score.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("size", [(90, 160), (150, 400), (113, 200), (256, 704), (300, 200), (900, 1600)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_decoded_pixels_and_calibration_agree(tmp_path, size, suffix):
    """Finds blurred white spots where the adapted calibration projects them."""
    spots = np.array([[420.0, 610.0], [801.5, 700.0], [1130.0, 823.25]])  # u, v of the stored image
    u, v = np.arange(1600) + 0.5, np.arange(900)[:, None] + 0.5
    picture = sum(np.exp(-((u - a) ** 2 + (v - b) ** 2) / (2 * 12.0**2)) for a, b in spots)
    path = tmp_path / f"spots.{suffix}"
    Image.fromarray((250 * picture).round().astype(np.uint8)).convert("RGB").save(path, quality=98)
    stored_from_cam = np.array([[1000.0, 0, 810], [0, 990, 470], [0, 0, 1]])
    image, img_from_cam = decode_image(path, stored_from_cam, size, (900, 1600))
    H, W = size
    assert image.shape == (3, H, W) and image.dtype == torch.uint8
    scale = img_from_cam[0, 0] / 1000
    assert scale == pytest.approx(max(W / 1600, H / 900))
    rays = np.linalg.inv(stored_from_cam) @ np.concatenate([spots, np.ones((3, 1))], axis=1).T
    expected = (img_from_cam @ rays)[:2].T
    v, u = np.mgrid[0:H, 0:W] + 0.5
    seen = 0
    for a, b in expected:
        weight = image[0].numpy().astype(float) * (np.hypot(u - a, v - b) < 60 * scale + 1)
        if min(a, b, W - a, H - b) > 60 * scale:
            found = np.array([(weight * u).sum(), (weight * v).sum()]) / weight.sum()
            assert np.abs(found - (a, b)).max() < 0.1
            seen += 1
    assert seen == (1 if size == (300, 200) else 3)


def encoded(kind, size):
    """The bytes of a picture with edges and gradients, in one of the forms that cameras and people store."""
    rng = np.random.default_rng(len(kind))
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    image, file, options = small.resize(size, Image.Resampling.BICUBIC), io.BytesIO(), {"quality": 90}
    if kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # viewers turn it, the pixels of the calibration do not
    if kind in ("L", "CMYK"):
        image = image.convert(kind)
    image.save(file, "JPEG", progressive=kind == "progressive", subsampling=0 if kind == "4:4:4" else 2, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["baseline", "progressive", "4:4:4", "turned", "L", "CMYK"])
def test_images_are_decoded_as_pillow_and_the_decoder_of_torchvision_do(kind):
    """Nothing but Pillow's decoder, its reduced sizes and its bilinear filter touch the pixels of training."""
    from torchvision.io import ImageReadMode, decode_jpeg

    for size in ((160, 90), (161, 91), (333, 217)):
        content = encoded(kind, size)
        for H, W in ((90, 160), (91, 161), (64, 112), (40, 80), (20, 40), (217, 333)):
            image = Image.open(io.BytesIO(content))
            scale = max(W / size[0], H / size[1])
            image.draft("RGB", (int(np.ceil(size[0] * scale)), int(np.ceil(size[1] * scale))))
            shrink = round(size[0] / image.size[0])
            left, top = (size[0] - W / scale) / 2, size[1] - H / scale
            box = (left / shrink, top / shrink, size[0] / shrink - left / shrink, size[1] / shrink)
            want = np.array(image.convert("RGB").resize((W, H), Image.Resampling.BILINEAR, box=box))
            found, _ = fit_image(Image.open(io.BytesIO(content)), np.eye(3), (H, W))
            assert found.is_contiguous() and np.array_equal(found.permute(1, 2, 0).numpy(), want)
        if kind != "CMYK":  # which torchvision converts by a formula of its own
            whole, _ = fit_image(Image.open(io.BytesIO(content)), np.eye(3), size[::-1])
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            assert torch.equal(whole, decode_jpeg(data, mode=ImageReadMode.RGB))


def test_real_images_have_the_pixels_of_torchvision(real_keyframe):
    from torchvision.io import decode_jpeg

    for path in sorted(real_keyframe.glob("**/*.jpg")):
        found, _ = decode_image(path, np.eye(3), (900, 1600))
        assert torch.equal(found, decode_jpeg(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)))


def test_decode_names_bad_files(tmp_path):
    path = tmp_path / "a.jpg"
    with pytest.raises(DataError, match=r"a\.jpg is missing"):
        decode_image(path, np.eye(3), (8, 8))
    path.write_text("hello")
    with pytest.raises(DataError, match=r"a\.jpg cannot be read as an image"):
        decode_image(path, np.eye(3), (8, 8))


def png_header(width, height):
    """A PNG of a few bytes whose header promises any size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    content = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, 400_000**2])  # the second is the devkit's
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, pillow_limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(36_000, 36_000))
    tracemalloc.start()
    for stored_size in (None, (36_000, 36_000), (900, 1600)):
        with pytest.raises(DataError, match=r"bomb\.png .*(36000 x 36000 pixels|exceeds limit)"):
            decode_image(path, np.eye(3), (90, 160), stored_size)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow
def test_damaged_images_are_named_whatever_pillow_raises(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    decoded = 0
    for suffix in ("jpg", "png", "bmp", "tiff", "webp", "ppm"):
        path = tmp_path / f"a.{suffix}"
        noise.save(path)
        whole = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 400), 3):
                damaged[place] = rng.integers(0, 256)
            path.write_bytes(damaged[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else damaged)
            try:
                image, _ = decode_image(path, np.eye(3), (8, 8))
                decoded += image.shape == (3, 8, 8)
            except DataError as error:
                assert f"a.{suffix}" in str(error) and "\n" not in str(error)
    assert decoded > 60


def test_a_picture_that_needs_another_program_is_not_opened(tmp_path):
    """Pillow gives PostScript to Ghostscript, which would run it."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(DataError, match=r"a\.jpg cannot be read as an image .cannot identify image file"):
        decode_image(path, np.eye(3), (8, 8))


def test_lines_are_resampled_and_padded():
    corner = MapLine(2, np.array([[0.0, 0], [4, 0], [4, 4]]))
    ring = MapLine(1, np.array([[0.0, 0], [0, 1], [1, 1], [1, 0], [0, 0]]), score=0.5)
    assert pad_lines([[], [corner]], points_per_line=5).valid.tolist() == [[False], [True]]
    assert pad_lines([[]], points_per_line=5).points.shape == (1, 0, 5, 2)
    lines = pad_lines([[corner], [], [ring, corner]], points_per_line=5, count=3)
    assert lines.points.shape == (3, 3, 5, 2)
    assert lines.valid.tolist() == [[True, False, False], [False] * 3, [True, True, False]]
    assert lines.points[0, 0].tolist() == [[0, 0], [2, 0], [4, 0], [4, 2], [4, 4]]
    assert lines.points[2, 0].tolist() == [[0, 0], [0, 1], [1, 1], [1, 0], [0, 0]]
    assert lines.closed.tolist() == [[False] * 3, [False] * 3, [True, False, False]]
    assert lines.label[2].tolist() == [1, 2, 0] and lines.score[2].tolist() == [0.5, 1.0, 0.0]


@pytest.fixture(scope="module")
def dataset(hand_root, tmp_path_factory):
    def make(**changes):
        options = {"image_size": (45, 80), "cameras": ("CAM_FRONT", "CAM_BACK"), "cache_dir": cache}
        return NuScenesDataset(hand_root, "v1.0-hand", "hand_val", **(options | changes))

    cache = tmp_path_factory.mktemp("cache")
    return make


def flat(noun):
    if noun is None:
        return []
    return [noun] if isinstance(noun, torch.Tensor) else [tensor for part in noun for tensor in flat(part)]


def test_collate_pads_ground_truth_and_keeps_each_item(dataset):
    a, b = dataset()[ClipRequest((0, 1), -1, (0,))], dataset()[ClipRequest((4, 5), 3, (0,))]
    # The second clip gets more boxes and lines.
    longer = a.gt._replace(boxes=map_tensors(lambda t: torch.cat([t, t, t], dim=1), a.gt.boxes))
    longer = longer._replace(lines=map_tensors(lambda t: torch.cat([t, t], dim=1), a.gt.lines))
    batch = collate([a, b._replace(gt=longer)])
    assert batch.frames.images.shape == (2, 2, 2, 3, 45, 80) and batch.sample_index.tolist() == [[0, 1], [4, 5]]
    assert batch.gt.boxes.center.shape == (2, 2, 6, 3) and batch.gt.lines.points.shape == (2, 2, 6, 20, 2)
    for got, want in zip(flat(batch.frames), flat(a.frames), strict=True):
        assert torch.equal(got[0], want)
    for got, want in zip(flat(batch.gt), flat(a.gt), strict=True):
        assert got.dtype == want.dtype and torch.equal(got[0][:, : want.shape[1]], want)
        assert not got[0][:, want.shape[1] :].any()  # padding: zero, and not valid
    for got, want in zip(flat(batch.gt), flat(longer), strict=True):
        assert torch.equal(got[1], want)


SCENES = [0] * 7 + [1] * 6 + [2] * 1 + [3] * 8 + [4] * 5


def test_order_depends_on_seed_and_epoch_only():
    sampler = TrainSampler(SCENES, batch_size=2, streams=1, frames_per_clip=2, drop=0.2, seed=3)
    sampler.set_epoch(2)
    again = TrainSampler(SCENES, batch_size=2, streams=1, frames_per_clip=2, drop=0.2, seed=3)
    first = list(again)
    again.set_epoch(2)
    assert list(sampler) == list(sampler) == list(again) != first
    assert len(first) == len(again) == 2 * round(26 * 0.8 / 2 / 2)  # the scene of one sample has no clip
    assert not {request.seed for request in first} & {request.seed for request in again}


@pytest.mark.parametrize(("drop", "streams"), [(0.0, 1), (0.3, 1), (0.0, 2)])
def test_each_stream_follows_its_scene_to_the_end(drop, streams):
    """Element k of every batch continues element k of the previous batch of its stream."""
    sampler = TrainSampler(SCENES, batch_size=3, streams=streams, frames_per_clip=2, drop=drop, seed=0)
    met, skipped = set(), 0
    for epoch in range(20):
        sampler.set_epoch(epoch)
        requests = list(sampler)
        batches = [requests[start : start + 3] for start in range(0, len(requests), 3)]
        for element in (column for s in range(streams) for column in zip(*batches[s::streams], strict=True)):
            last = None
            for clip in element:
                assert len({SCENES[i] for i in clip.samples}) == 1 and list(clip.samples) == sorted(set(clip.samples))
                if clip.previous >= 0:  # the same scene with the same augmentation
                    assert last.samples[-1] == clip.previous < clip.samples[0] and last.seed == clip.seed
                    assert SCENES[clip.previous] == SCENES[clip.samples[0]]
                    skipped += clip.samples[0] - clip.previous > 1
                elif last is not None:  # the previous scene has ended: its remaining samples do not fill a clip
                    assert last.seed != clip.seed
                    if drop == 0:
                        end = max(i for i, scene in enumerate(SCENES) if scene == SCENES[last.samples[0]])
                        assert end - last.samples[-1] < 2
                met.update(clip.samples)
                last = clip
    if streams == 1:  # with two streams, an epoch of so few samples ends before its scenes do
        assert met == set(range(26 + 1)) - {13}  # all but the scene of one sample
    assert (skipped > 0) == (drop > 0)


def test_ranks_have_different_scenes_and_equal_numbers_of_batches():
    whole = list(TrainSampler(list(range(12)) * 3, batch_size=4, streams=2, frames_per_clip=1, drop=0.0, seed=1))
    ranks = [list(TrainSampler(list(range(12)) * 3, 2, 2, 1, 0.0, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(rank) for rank in ranks] == [18, 18] and sorted(ranks[0] + ranks[1]) == sorted(whole)


def test_small_datasets_and_scenes_that_lose_all_but_a_clip():
    one = TrainSampler([0, 0], batch_size=2, streams=1, frames_per_clip=2, drop=0.0, seed=0)
    assert len(one) == len(list(one)) == 2  # one batch, though it holds the only clip twice
    sampler, found = TrainSampler([0] * 4, batch_size=1, streams=1, frames_per_clip=2, drop=0.5, seed=0), set()
    for epoch in range(60):
        sampler.set_epoch(epoch)
        found |= {request.samples for request in sampler}
    # All pairs occur: the first and the last sample make a clip if exactly these two are kept.
    assert found == {(i, j) for i in range(4) for j in range(i + 1, 4)}


def test_the_largest_image_is_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (32, 18)).save(tmp_path / "a.png")
    monkeypatch.setattr(loader, "MAX_PIXELS", 32 * 18)
    assert decode_image(tmp_path / "a.png", np.eye(3), (9, 16))[0].shape == (3, 9, 16)
    monkeypatch.setattr(loader, "MAX_PIXELS", 32 * 18 - 1)
    with pytest.raises(DataError, match=r"a\.png is 32 x 18 pixels according to its header, and at most"):
        decode_image(tmp_path / "a.png", np.eye(3), (9, 16))


def test_clips_longer_than_all_scenes_are_refused():
    with pytest.raises(ConfigError, match=r"train\.frames_per_clip is 9.*use at most 8"):
        TrainSampler(SCENES, batch_size=1, streams=1, frames_per_clip=9, drop=0.0, seed=0)


def test_streams_follow_scenes():
    scenes = [0, 0, 1, 1, 1, 2, 2, 3]
    assert list(SceneStreamSampler(scenes)) == list(range(8))
    shares = [list(SceneStreamSampler(scenes, rank, 3)) for rank in range(3)]
    assert shares == [[0, 1, 7], [2, 3, 4], [5, 6]]


def test_augmentation_depends_on_the_request_not_on_workers(dataset):
    data = dataset(augment=Augment(extrinsics_noise_deg=1.0, drop_camera=0.5, corrupt=0.5))
    sampler = TrainSampler(data.scene_of_sample, batch_size=2, streams=1, frames_per_clip=1, drop=0.0, seed=5)
    sampler.set_epoch(1)
    alone = list(DataLoader(data, batch_size=2, sampler=sampler, collate_fn=collate))
    shared = list(DataLoader(data, batch_size=2, sampler=sampler, collate_fn=collate, num_workers=2))
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))
    same, changed = data[ClipRequest((1,), 0, (5, 1, 1))], data[ClipRequest((1,), 0, (5, 2, 1))]
    assert torch.equal(same.frames.images, data[ClipRequest((1,), 0, (5, 1, 1))].frames.images)
    assert not torch.equal(same.frames.rig.ego_from_cam, changed.frames.rig.ego_from_cam)
