"""What `perception predict` writes of a recording, read with the readers of its formats."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings

import av
import numpy as np
import pytest
import rerun
from conftest import PROJECT, noisy
from mcap.reader import make_reader
from mcap_protobuf.decoder import DecoderFactory
from mutate import damage_bytes, run_cases
from PIL import Image
from scipy.spatial.transform import Rotation

from perception.cli import main
from perception.cli.view import recording_file
from perception.errors import ConfigError, DataError, PerceptionError, PerceptionWarning, run_script
from perception.files import new_folder
from perception.inference.predictor import Predictor
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import save_checkpoint
from perception.recordings import open_recording
from perception.recordings.outputs import FILES, FORMATS, parsed_formats, picture_of, write_predictions
from perception.recordings.predicting import predict_frames
from perception.rigs import Rig
from perception.types import BOX_CLASSES, LINE_CLASSES, LiveObjects, map_tensors

pytestmark = pytest.mark.filterwarnings("ignore::perception.errors.PerceptionWarning")


@pytest.fixture(scope="module")
def network():
    config = BEVTransformerConfig.preset(
        "nano", image_size=(40, 80), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2,
        box_queries=20, line_queries=8, line_points=6,
    )  # fmt: skip
    return noisy(BEVTransformer, config)


@pytest.fixture(scope="module")
def written(network, converted, tmp_path_factory):
    """All formats of the scene's bag, without its third front image; and what was predicted."""
    folder = shutil.copytree(converted("folder"), tmp_path_factory.mktemp("recorded") / "images")
    sorted((folder / "CAM_FRONT").iterdir())[2].unlink()
    recording, predictor = open_recording(folder), Predictor(network)
    out = tmp_path_factory.mktemp("written") / "out"
    plan = recording.plan(reference="CAM_BACK")
    summary = write_predictions(predictor, recording, out, plan=plan, formats=FORMATS, note="a note")
    assert summary.frames == 4 and summary.with_memory == 3 and summary.images["CAM_FRONT"] == 3
    frames = list(predict_frames(predictor, recording.rig, recording.frames(plan)))
    assert summary.boxes == sum(len(frame.objects.boxes.score) for frame in frames) > 0
    assert summary.lines == sum(len(frame.objects.lines.score) for frame in frames) > 0
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES.values())
    return out, frames


def test_json_lines_hold_the_results(written):
    out, frames = written
    lines = (out / FILES["jsonl"]).read_text().splitlines()
    for line, frame in zip(lines, frames, strict=True):
        found = LiveObjects.from_json(line)
        for a, b in zip((*found.boxes, *found.lines), (*frame.objects.boxes, *frame.objects.lines), strict=True):
            np.testing.assert_array_equal(a, b)
        assert found.info.time_s == frame.recorded.time_s and found.info.used_memory == frame.objects.info.used_memory


def test_mcap_holds_boxes_and_lines(written):
    out, frames = written
    messages = {}
    with (out / FILES["mcap"]).open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        for schema, channel, raw, content in reader.iter_decoded_messages():
            messages.setdefault((channel.topic, raw.log_time), (schema.name, content))
    times = [frame.recorded.time_ns for frame in frames]
    assert {time for _, time in messages} == set(times)
    for frame, time_ns in zip(frames, times, strict=True):
        kind, update = messages["/perception/objects", time_ns]
        assert kind == "foxglove.SceneUpdate" and update.deletions[0].type == 1
        boxes, lines = frame.objects.boxes, frame.objects.lines
        entities = {entity.id: entity for entity in update.entities}
        assert set(entities) == {f"box {m}" for m in range(len(boxes.score))} | {
            f"line {m}" for m in range(len(lines.score))
        }
        assert all(entity.frame_id == "ego" for entity in update.entities)
        for m in range(len(boxes.score)):
            (cube,), facts = entities[f"box {m}"].cubes, {d.key: d.value for d in entities[f"box {m}"].metadata}
            at, turn = cube.pose.position, cube.pose.orientation
            np.testing.assert_array_equal([at.x, at.y, at.z], boxes.center[m].double())
            np.testing.assert_array_equal([cube.size.x, cube.size.y, cube.size.z], boxes.size[m].double())
            yaw = Rotation.from_quat([turn.x, turn.y, turn.z, turn.w]).as_euler("zyx")[0]
            assert np.cos(yaw - float(boxes.yaw[m])) > 1 - 1e-9
            assert facts["class"] == BOX_CLASSES[boxes.label[m]]
            assert np.float32(facts["score"]) == boxes.score[m].numpy()
            velocity = [np.float32(facts["velocity_x"]), np.float32(facts["velocity_y"])]
            np.testing.assert_array_equal(velocity, boxes.velocity[m])
        for m in range(len(lines.score)):
            (strip,), facts = entities[f"line {m}"].lines, {d.key: d.value for d in entities[f"line {m}"].metadata}
            assert strip.type == 0 and facts["class"] == LINE_CLASSES[lines.label[m]]
            np.testing.assert_array_equal([[p.x, p.y] for p in strip.points], lines.points[m].double())
        moved = {t.child_frame_id: t for t in messages["/tf", time_ns][1].transforms}
        assert moved["ego"].parent_frame_id == "world"
        np.testing.assert_allclose(moved["ego"].translation.x, frame.recorded.global_from_ego[0, 3])
        for n, name in enumerate(frame.names):
            place = moved[name].translation
            np.testing.assert_allclose([place.x, place.y, place.z], frame.rig.ego_from_cam[n, :3, 3])
            if name == "CAM_FRONT" and frame.images[n] is None:
                assert ("/cameras/CAM_FRONT/image", time_ns) not in messages
                continue
            kind, calibration = messages[f"/cameras/{name}/calibration", time_ns]
            assert kind == "foxglove.CameraCalibration" and calibration.frame_id == name
            np.testing.assert_array_equal(calibration.K, frame.rig.img_from_cam[n].ravel())
            kind, image = messages[f"/cameras/{name}/image", time_ns]
            assert kind == "foxglove.CompressedImage" and image.format == "jpeg"
            assert image.data[:2] == b"\xff\xd8" and (calibration.width, calibration.height) == (224, 128)


def test_rerun_holds_boxes_and_lines(written):
    out, frames = written
    recording = rerun.dataframe.load_recording(out / FILES["rrd"])

    def column(entity: str, component: str) -> list:
        view = recording.view(index="frame", contents={entity: [component]})
        return view.select().read_all().column(f"{entity}:{component}").to_pylist()

    for entity, component, wanted in (
        ("/world/ego/boxes", "PoseTranslation3D", lambda frame: frame.objects.boxes.center),
        ("/world/ego/boxes", "HalfSize3D", lambda frame: frame.objects.boxes.size / 2),
        ("/world/ego/boxes", "ClassId", lambda frame: frame.objects.boxes.label),
        ("/world/ego/boxes", "score", lambda frame: frame.objects.boxes.score),
        ("/world/ego/lines", "score", lambda frame: frame.objects.lines.score),
        ("/world/ego/velocities", "Vector3D", lambda frame: np.pad(frame.objects.boxes.velocity, ((0, 0), (0, 1)))),
    ):
        for found, frame in zip(column(entity, component), frames, strict=True):
            np.testing.assert_array_equal(np.array(found, np.float32), np.asarray(wanted(frame), np.float32))
    for found, frame in zip(column("/world/ego/lines", "LineStrip3D"), frames, strict=True):
        wanted = np.pad(frame.objects.lines.points, ((0, 0), (0, 0), (0, 1)))
        np.testing.assert_array_equal(np.array(found, np.float32), wanted)
    for found, frame in zip(column("/world/ego/boxes", "PoseRotationQuat"), frames, strict=True):
        yaw = Rotation.from_quat(found).as_euler("zyx")[:, 0]
        assert (np.cos(yaw - frame.objects.boxes.yaw.numpy()) > 1 - 1e-6).all()
    moved = column("/world/ego", "Translation3D")
    first = frames[0].recorded.global_from_ego[:3, 3]
    for found, frame in zip(moved, frames, strict=True):
        np.testing.assert_allclose(found[0], frame.recorded.global_from_ego[:3, 3] - first, atol=1e-4)
    front = column("/world/ego/cameras/CAM_FRONT", "PinholeProjection")
    np.testing.assert_allclose(np.reshape(front[0][0], (3, 3)).T, frames[0].rig.img_from_cam[0], rtol=1e-6)


def test_pictures_and_the_video_show_the_same(written, converted):
    out, frames = written
    pictures = sorted((out / "pictures").iterdir())
    assert [path.stem for path in pictures] == [f"{k:06d}_{f.recorded.time_ns}" for k, f in enumerate(frames)]
    with av.open(str(out / FILES["mp4"])) as video:
        images = list(video.decode(video=0))
    first = frames[0].recorded.time_ns
    rig = open_recording(converted("folder")).rig
    for image, path, frame in zip(images, pictures, frames, strict=True):
        assert round(float(image.pts * image.time_base), 6) == round((frame.recorded.time_ns - first) * 1e-9, 6)
        shown, drawn = image.to_ndarray(format="rgb24"), np.asarray(Image.open(path))
        drawn = drawn[: shown.shape[0], : shown.shape[1]]
        assert np.abs(shown.astype(int) - drawn).mean() < 3
        boxes, lines, seen = (map_tensors(lambda tensor: tensor[:0], part) for part in frame.objects[:3])
        nothing = frame.objects._replace(boxes=boxes, lines=lines, seen=seen)
        without = np.asarray(picture_of(frame._replace(objects=nothing), rig, "a note"))
        assert (without != np.asarray(Image.open(path))).any(-1).sum() > 999


def test_what_fails_leaves_nothing(network, converted, tmp_path, monkeypatch):
    path = shutil.copytree(converted("folder"), tmp_path / "images")
    recording = open_recording(path)
    out = tmp_path / "out"
    sorted((path / "CAM_BACK").iterdir())[-1].write_bytes(b"\xff\xd8 no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        write_predictions(Predictor(network), recording, out, formats=FORMATS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]
    with pytest.raises(DataError, match=r"images: exists and is not empty; remove it or give another folder"):
        write_predictions(Predictor(network), open_recording(converted("folder")), path)
    rig = recording.rig
    with pytest.raises(
        DataError, match=r"images.'CAM_FRONT'. is 224 x 128 pixels, and the rig is calibrated for 112 x 64"
    ):
        write_predictions(Predictor(network), open_recording(converted("folder")), out, rig=rig.scaled(0.5))
    nothing = recording.__class__("x", recording.times_ns, recording.decode)
    with pytest.raises(DataError, match="x holds no calibration; give a rig"):
        write_predictions(Predictor(network), nothing, out)
    for package, format in (("rerun", "rrd"), ("mcap_protobuf.writer", "mcap"), ("av", "mp4")):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, package, None)
            with pytest.raises(ConfigError, match=r"is not installed; install it, or the extra \[recordings\]"):
                write_predictions(Predictor(network), recording, out, formats=("jsonl", format))
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


def test_new_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder(".") as folder:
        (folder / "a").touch()
    assert (tmp_path / "a").exists()


def test_names_of_formats():
    assert parsed_formats("mp4, jsonl,mp4") == ("mp4", "jsonl")
    for text, words in (
        ("mp5", "--write has 'mp5'; did you mean mp4"),
        (" ,", "--write names no format; give some of"),
    ):
        with pytest.raises(ConfigError, match=words):
            parsed_formats(text)


# The commands


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_checkpoint(path, network, {})
    return path


def test_predict_takes_a_recording(converted, weights, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["predict", "--images", str(converted("bag")), "--checkpoint", str(weights), "--min-score", "0"]
    main([*command, "--out", str(out), "--write", "jsonl", "--frames", "3", "--reference", "/LIDAR_TOP/points"])
    printed = capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["results.jsonl"] and "note: " not in printed
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and [row["memory"]["used"] for row in rows] == [False, True, True]
    assert f"wrote {out / 'results.jsonl'}" in printed
    assert [line.split() for line in printed.splitlines() if line.startswith("CAM_FRONT ")] == [["CAM_FRONT", "3"]]
    images = shutil.copytree(converted("folder"), tmp_path / "images")
    (images / "poses.txt").unlink()
    main(
        [
            "predict",
            "--images",
            str(images),
            "--checkpoint",
            str(weights),
            "--out",
            str(tmp_path / "b"),
            "--write",
            "jsonl",
        ]
    )
    printed = capsys.readouterr().out
    assert printed.count("without memory") == 1 and "note: the recording has no odometry: give --poses" in printed
    rows = [json.loads(line) for line in (tmp_path / "b" / "results.jsonl").read_text().splitlines()]
    assert all(row["global_from_ego"] is None and row["memory"]["reason"] == "no pose was given" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--images", "x", "--out", "o", "--split", "s"), "--split belongs to --dataroot; leave it out"),
        (("--info", "x", "--out", "o.png", "--rig", "r"), "--rig belongs to --images; leave it out"),
        (("--images", "x", "--out", "o", "--sample", "s"), "--sample belongs to --dataroot or --info; leave it out"),
        (("--images", "x", "--out", "file"), "--out file is a file; give a folder"),
        (("--images", "x", "--out", "o", "--write", "avi"), "--write has 'avi'; give one of jsonl, pictures"),
        (("--images", "x", "--out", "o", "--cameras", "front"), "--cameras has 'front'; give CAMERA=TOPIC"),
        (("--images", "x", "--out", "o"), "x does not exist; give a folder of images, videos, or a ROS bag"),
        (("--images", "x", "--out", "o", "--fps", "0"), "argument --fps: 0 is out of range"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, monkeypatch, capsys, arguments, sentence):
    (tmp_path / "file").write_text("here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, PerceptionError)) as stop:
        main(["predict", *arguments])
    assert sentence in f"{stop.value} {capsys.readouterr().err}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_simulate_writes_recordings(tmp_path, capsys):
    small = ["--scenes", "1", "--keyframes", "2", "--image-size", "32x56", "--workers", "1", "--seed", "5"]
    main(["simulate", "--out", str(tmp_path / "bags"), "--format", "bag", *small])
    assert [line.split() for line in capsys.readouterr().out.splitlines()][1] == ["keyframes", "2"]
    (bag,) = (tmp_path / "bags").iterdir()
    recording = open_recording(bag)
    assert bag.name == "scene-0001" and len(recording.plan()) == 2 and len(recording.trajectory) == 14
    with pytest.raises(DataError, match="bags: exists and is not empty"):
        main(["simulate", "--out", str(tmp_path / "bags"), "--format", "folder", *small])


def test_the_viewer_gets_a_recording(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"none.rrd does not exist; give a .rrd file, or make one with: perception predict"
    ):
        recording_file(tmp_path / "none.rrd")
    for name, words in (("a.mcap", "is an MCAP file: open it with Foxglove"), ("a.rrd", "is no recording of rerun")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=words):
            recording_file(tmp_path / name)
    (tmp_path / "a.rrd").write_bytes(b"RRF2")
    assert recording_file(tmp_path) == tmp_path / "a.rrd"
    (tmp_path / "b.rrd").write_bytes(b"RRF2")
    with pytest.raises(DataError, match=r"holds 2 \.rrd files; give one of them"):
        recording_file(tmp_path)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "WAYLAND_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="there is no display to show"):
        main(["view", str(tmp_path / "a.rrd")])
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ConfigError, match=r"rerun is not installed; install it, or the extra \[recordings\]"):
        main(["view", str(tmp_path / "a.rrd"), "--web"])


@pytest.mark.slow
def test_the_viewer_serves_a_page(written):
    command = [sys.executable, "-m", "perception", "view", str(written[0]), "--web"]
    # A shell lets the processes that it runs in the background ignore SIGINT, and pytest may be one of them.
    viewer = subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        page = b""
        for _ in range(240):
            time.sleep(0.5)
            try:
                page = urllib.request.urlopen("http://127.0.0.1:9090", timeout=10).read()
                break
            except OSError:
                assert viewer.poll() is None
        assert b"Rerun" in page
    finally:
        viewer.send_signal(signal.SIGINT)
        viewer.wait(20)
    with pytest.raises(OSError, match="refused"):  # no process is left behind
        urllib.request.urlopen("http://127.0.0.1:9090", timeout=10)


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_the_next_one_keeps(converted, weights, tmp_path):
    command = [sys.executable, "-m", "perception", "predict", "--images", str(converted("bag")), "--checkpoint",
               str(weights), "--out", str(tmp_path / "out"), "--write", "jsonl,pictures,mp4,rrd,mcap"]  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGKILL):
        run = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list(tmp_path.glob(".out.partial/pictures/*.png")):
            assert run.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        run.send_signal(number)
        assert run.wait(30) in (143, -9)
        assert not (tmp_path / "out").exists()
        assert [path.name for path in tmp_path.iterdir()] == ([] if number == signal.SIGTERM else [".out.partial"])
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 4


# Damaged recordings

CASES = {"bag": 20, "sqlite-bag": 12, "ros1-bag": 20, "video": 15, "folder": 30}  # times six in the slow suite


@pytest.fixture(params=[1, pytest.param(6, marks=pytest.mark.slow)], ids=["some", "many"])
def budget(request) -> int:
    return request.param


@pytest.mark.parametrize("format", CASES)
def test_damaged_recordings_are_refused_with_a_sentence_or_read(converted, town_root, tmp_path, budget, format):
    rig = open_recording(town_root).rig
    path = converted(format)
    path = shutil.copytree(path, tmp_path / "a") if path.is_dir() else shutil.copy(path, tmp_path / "a.bag")
    path = tmp_path / path.name if hasattr(path, "name") else tmp_path / "a.bag"
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    whole = {file: file.read_bytes() for file in files}

    def case(rng: random.Random):
        file = rng.choice(files)
        data = whole[file]
        # Mostly where the structure is: at the beginning and the end.
        start = rng.choice((0, 0, max(len(data) - 3000, 0), rng.randrange(len(data))))
        end = min(start + 3000, len(data))
        file.write_bytes(data[:start] + damage_bytes(data[start:end], rng) + data[end:])
        try:
            recording = open_recording(path, rng.choice((rig, None)))
            assert isinstance(recording.rig, Rig)
            for frame in recording:
                assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in frame.images.values())
                assert frame.global_from_ego is None or np.isfinite(frame.global_from_ego).all()
        finally:
            file.write_bytes(whole[file])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerceptionWarning)
        read = run_cases(f"recordings {format} {budget}", CASES[format] * budget, case, PerceptionError)
    assert read < CASES[format] * budget, "no damage was found"


def test_a_damaged_recording_ends_the_command_with_one_line(converted, weights, tmp_path, capsys):
    (tmp_path / "a.mcap").write_bytes(next(converted("bag").glob("*.mcap")).read_bytes()[:20_000])
    command = [
        "predict",
        "--images",
        str(tmp_path / "a.mcap"),
        "--checkpoint",
        str(weights),
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: main(command))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith(f"error: {tmp_path / 'a.mcap'} cannot be read as a ROS bag")
    assert len(error.splitlines()) == 1 and not (tmp_path / "o").exists()
