"""Runs inference on a recording of cameras, or on one sample of a dataset, and writes and draws the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from perception.cli import add_import, add_launcher, add_precision, command_parser, number, output_file

EXAMPLE = """examples:
  perception predict --images drive.mcap --out out/drive --write jsonl,mp4,rrd
  perception predict --images front.mp4 left.mp4 right.mp4 --rig rig.yaml --out out/drive
  perception predict --images images/ --rig rig.yaml --poses poses.txt --out out/drive --write pictures
  perception predict --dataroot out/town --version v1.0-synthetic --split town_try --sample TOKEN \\
      --out out/sample.png --json out/sample.json
  perception predict --info sample.json --map-vectors map_vectors.json --out out/sample.png
  perception predict --info data/kitti/kitti_infos_val.pkl --sample 8 --data-prefix training/image_2 --out out/8.png

A recording is a folder of images, videos (one per camera), a ROS bag, a drive of KITTI raw, or a nuScenes-format
dataset. A sample of a dataset is predicted with the temporal memory of its scene, a sample of an info file without
memory.
"""


def predict_sample(model, arguments):
    """Returns token, clip [B=1, T=1] with ground truth, objects and camera names of a sample of a dataset."""
    from collections import deque

    import numpy as np

    from perception.data.loader import collate
    from perception.data.nuscenes import NuScenesDataset
    from perception.errors import DataError
    from perception.inference.sequence import run_sequence_seen

    dataset = NuScenesDataset(
        arguments.dataroot,
        arguments.version,
        arguments.split,
        image_size=model.config.image_size,
        points_per_line=100,
    )
    tokens = dataset.tokens
    sample = arguments.sample or tokens[-1]
    if sample not in tokens:
        raise DataError(
            f"{arguments.dataroot}: split '{arguments.split}' has no sample {sample}; its first is {tokens[0]}"
        )
    target = tokens.index(sample)
    start = int(np.flatnonzero(dataset.scene_of_sample == dataset.scene_of_sample[target])[0])
    clips = (collate([dataset[i]]) for i in range(start, target + 1))
    clip, scene, _ = deque(
        run_sequence_seen(model, clips), maxlen=1
    ).pop()  # what comes before the sample fills the memory
    info = scene.info._replace(
        time_s=float(dataset.timestamps[target]), global_from_ego=dataset.ego_pose(target).astype(float)
    )
    return sample, clip, scene._replace(info=info), dataset.cameras


def predict_info(model, arguments):
    """As `predict_sample`, of an entry of an info file."""
    from perception.data.info_files import read_info
    from perception.data.loader import collate, pad_lines
    from perception.data.map_vectors import load_map_vectors
    from perception.errors import DataError
    from perception.inference.sequence import run_sequence_seen

    info = read_info(arguments.info, arguments.sample or arguments.index or 0)
    wanted = model.config.cameras
    if wanted is not None and len(info.cameras) != wanted:
        raise DataError(
            f"{info.name} has {len(info.cameras)} cameras, and {arguments.checkpoint} takes {wanted}; give weights "
            "that take any number, such as nano"
        )
    clip = info.clip(image_size=model.config.image_size, data_prefix=prefixes(arguments.data_prefix))
    if arguments.map_vectors:
        lines = pad_lines([load_map_vectors(arguments.map_vectors, info.global_from_ego())], 100)
        clip = clip._replace(gt=clip.gt._replace(lines=lines))
    clip, scene, _ = next(run_sequence_seen(model, [collate([clip])]))
    return info.name, clip, scene, info.cameras


def prefixes(texts: Sequence[str] | None) -> dict[str, str] | None:
    """The folder by camera of `--data-prefix`, a folder alone under the key `img`; None without any."""
    if not texts:
        return None
    pairs = (text.partition("=") if "=" in text else ("img", "=", text) for text in texts)
    return {name: folder for name, _, folder in pairs}


def shown(scene, min_score: float, min_seen: float):
    """Returns the boxes and lines that reach both thresholds, with what is seen of them and their ids."""
    from perception.inference.visibility import kept_by
    from perception.types import NumpySeen, Seen, chosen

    seen = kept_by(NumpySeen(scene.seen.boxes.numpy(), scene.seen.lines.numpy()), min_seen)
    boxes, lines = (
        (objects.valid & (objects.score >= min_score)).numpy() & kept
        for objects, kept in zip((scene.boxes, scene.lines), seen, strict=True)
    )
    return chosen(scene._replace(seen=Seen(scene.seen.boxes[boxes], scene.seen.lines[lines])), boxes, lines)


def count_matches(scene, gt) -> tuple[int, int]:
    """Counts the predicted boxes and lines that match the ground truth, each of which matches once.

    A box matches one of its class with a centre within 2 m, the larger threshold of nuScenes' true-positive errors; a
    line one of its class with a Chamfer distance of 1 m, the middle threshold of the MapTR protocol. The best score
    comes first.
    """
    import numpy as np

    from perception.evaluation.lanes import match_lines
    from perception.types import MapLine

    boxes, free = 0, gt.boxes.valid.numpy().copy()
    for label, center in zip(scene.boxes.label, scene.boxes.center.numpy(), strict=True):  # highest score first
        distance = np.linalg.norm(gt.boxes.center.numpy()[:, :2] - center[:2], axis=1)
        distance[~free | (gt.boxes.label != label).numpy()] = np.inf
        if len(distance) and distance.min() <= 2.0:
            free[distance.argmin()] = False
            boxes += 1

    def as_lines(lines):
        rows = zip(lines.label, lines.points.numpy().astype(float), lines.score, lines.valid, strict=True)
        return [MapLine(int(label), points, float(score)) for label, points, score, valid in rows if valid]

    matches = match_lines(as_lines(scene.lines), as_lines(gt.lines), thresholds=(1.0,))
    return boxes, int(matches.hit.sum())


def predict_recording(arguments) -> None:
    """Predicts the frames of a recording, writes them into a folder, and prints a table."""
    from perception.inference.live import NO_MEMORY
    from perception.inference.predictor import Predictor
    from perception.recordings import open_recording
    from perception.recordings.outputs import FILES, parsed_formats, write_predictions

    formats = parsed_formats(arguments.write)
    names = ("fps", "start", "poses", "pose_topic", "reference", "base_frame", "base_height", "version", "scene")
    given = {name: getattr(arguments, name) for name in names}
    recording = open_recording(arguments.images, arguments.rig, streams=streams(arguments.cameras), **given)
    plan = recording.plan(
        reference=arguments.reference, tolerance=arguments.tolerance, rate=arguments.rate, count=arguments.frames
    )
    predictor = Predictor(
        arguments.checkpoint, arguments.device, precision=arguments.precision, min_score=arguments.min_score,
        min_seen=arguments.min_seen,
    )  # fmt: skip
    notes = list(recording.notes)
    provenance = predictor.provenance
    if provenance is not None and provenance.is_generated and arguments.version != provenance.versions[0]:
        notes.insert(0, "the weights were trained on generated scenes only and are of no use on real images")
    with caught() as found:
        summary = write_predictions(
            predictor, recording, arguments.out, plan=plan, formats=formats, note=notes[0] if notes else "",
            progress=True,
        )  # fmt: skip
    known = NO_MEMORY.format(reason="no pose was given")  # said below in the words of the command line
    notes += [sentence for sentence in found if sentence != known]
    print(f"{'camera':24s}{'frames':>8s}")
    for camera, count in summary.images.items():
        print(f"{camera:24s}{count:>8d}")
    rows = {"all": summary.frames, "with memory": summary.with_memory, "without a pose": summary.without_pose}
    for name, count in rows.items():
        print(f"{name:24s}{count:>8d}")
    print(f"{summary.boxes} boxes and {summary.lines} lines of score {arguments.min_score:g} or more")
    for format in formats:
        print(f"wrote {arguments.out / FILES[format]}")
    print(f"weights: {provenance or 'their file does not say what they were trained on'}")
    print(f"precision: {predictor.model.choice}")
    if recording.trajectory is None:
        notes.append("the recording has no odometry: give --poses, or every frame stands for itself, without memory")
    elif summary.without_pose:
        notes.append(
            f"the pose of {summary.without_pose} frames is not known, and they stand for themselves, without memory: "
            f"poses are those of {recording.trajectory.source}"
        )
    for note in notes:
        print(f"note: {note}")


@contextmanager
def caught() -> Iterator[list[str]]:
    """Yields a list that holds the sentences of the PerceptionWarnings of the block after it; others are passed on."""
    import warnings

    from perception.errors import PerceptionWarning

    sentences: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", PerceptionWarning)
        yield sentences
    for warning in found:
        if issubclass(warning.category, PerceptionWarning):
            sentences.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    sentences[:] = dict.fromkeys(sentences)


def streams(texts: Sequence[str] | None) -> dict[str, str]:
    """The topic, folder or file by camera of `--cameras`."""
    from perception.errors import ConfigError

    found = {}
    for text in texts or ():
        camera, equals, label = text.partition("=")
        if not (camera and equals and label):
            raise ConfigError(f"--cameras has {text!r}; give CAMERA=TOPIC, CAMERA=FOLDER or CAMERA=FILE")
        found[camera] = label
    return found


# Options by the source that they belong to.
OWN = {
    "images": ("rig", "write", "cameras", "poses", "pose_topic", "reference", "tolerance", "rate", "frames", "fps",
               "start", "base_frame", "base_height", "scene", "version", "device"),
    "dataroot": ("version", "split", "sample", "json"),
    "info": ("sample", "index", "data_prefix", "map_vectors", "json"),
}  # fmt: skip
DEFAULTS = {"write": "jsonl,pictures,mp4", "tolerance": 0.05, "device": "cpu"}


def check_options(arguments) -> str:
    """Returns the source, after checking that all other options belong to it; fills in the defaults of its options."""
    from perception.errors import ConfigError

    source = next(name for name in OWN if getattr(arguments, name))
    for name in dict.fromkeys(name for names in OWN.values() for name in names):
        if name not in OWN[source] and getattr(arguments, name) is not None:
            owners = " or ".join(f"--{owner}" for owner, names in OWN.items() if name in names)
            raise ConfigError(f"--{name.replace('_', '-')} belongs to {owners}; leave it out")
    for name, value in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return source


def main(argv: Sequence[str] | None = None) -> None:
    from perception.inference.visibility import MIN_SEEN

    parser = command_parser("predict", __doc__, EXAMPLE)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", nargs="+", type=Path, metavar="PATH", help="a recording, see below")
    source.add_argument("--dataroot", type=Path, help="one sample of a nuScenes-format dataset")
    source.add_argument("--info", type=Path, help="one entry of an info file of mmdet3d v1.1, .pkl or JSON")
    parser.add_argument(
        "--checkpoint",
        default="nano",
        help="a .safetensors file, or the name of weights that came with the library (default: %(default)s)",
    )
    parser.add_argument(
        "--min-score", type=number(float, 0, 1), default=0.3, help="score threshold (default: %(default)s)"
    )
    parser.add_argument(
        "--min-seen",
        type=number(float, 0, 1),
        default=MIN_SEEN,
        help="share of a box or line that a camera must see, or have seen before (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to create, with --images; else the picture to write, .png"
    )
    add_precision(parser, default="auto")
    add_import(parser)
    add_launcher(parser)
    recorded = parser.add_argument_group("with --images")
    recorded.add_argument(
        "--rig", help="rig file, or the name of a rig of the library (default: that of the recording)"
    )
    recorded.add_argument(
        "--write",
        metavar="FORMATS",
        help=f"some of jsonl,pictures,mp4,rrd,mcap (default: {DEFAULTS['write']})",
    )
    recorded.add_argument(
        "--cameras", nargs="+", metavar="CAMERA=STREAM", help="topic, folder or file of cameras, if names do not tell"
    )
    recorded.add_argument("--poses", type=Path, help="trajectory file: lines of time x y z qx qy qz qw")
    recorded.add_argument("--pose-topic", help="bags: topic of the odometry (default: the one there is), or /tf")
    recorded.add_argument(
        "--reference", metavar="STREAM", help="camera, or topic, whose times are those of the frames (default: slowest)"
    )
    recorded.add_argument(
        "--tolerance",
        type=number(float, 0, 10),
        help=f"seconds between the images of a frame and its time (default: {DEFAULTS['tolerance']})",
    )
    recorded.add_argument("--rate", type=number(float, 1e-3, 1000), help="frames per second (default: all)")
    recorded.add_argument("--frames", type=number(int, 1), help="at most so many frames")
    recorded.add_argument("--fps", type=number(float, 1e-3, 1000), help="folders, videos: images per second")
    recorded.add_argument("--start", type=number(float, 0), help="folders, videos: seconds of the first image")
    recorded.add_argument("--base-frame", help="bags: the vehicle frame (default: base_link)")
    recorded.add_argument(
        "--base-height", type=number(float, -10, 10), help="bags: metres of the vehicle frame above the ground"
    )
    recorded.add_argument("--scene", help="nuScenes format: name of the scene (default: the first)")
    recorded.add_argument("--device", help=f"such as cpu or cuda (default: {DEFAULTS['device']})")
    sample = parser.add_argument_group("with --dataroot or --info")
    sample.add_argument("--version", help="folder of tables of the dataset")
    sample.add_argument("--split", help="split that holds the sample")
    sample.add_argument(
        "--sample",
        help="token (default: the last sample of the split); with --info the token or sample_idx of an entry",
    )
    sample.add_argument("--index", type=number(int, 0), help="with --info: number of the entry (default: 0)")
    sample.add_argument(
        "--data-prefix",
        nargs="+",
        metavar="[CAMERA=]FOLDER",
        help="with --info: where the images are, as in mmdet3d's data_prefix, relative to the info file (default: next "
        "to it, or where nuScenes, KITTI and Waymo have them)",
    )
    sample.add_argument("--map-vectors", type=Path, help="with --info: JSON of global polylines, drawn as ground truth")
    sample.add_argument("--json", type=output_file("--json"), help="file for the result, in the format of live results")
    arguments = parser.parse_args(argv)

    from perception.errors import ConfigError
    from perception.files import check_dataset, check_writable, replacing

    kind = check_options(arguments)
    check_writable("--out", arguments.out, folder=kind == "images")
    if arguments.launcher != "none":
        from perception.engine.launchers import join_processes
        from perception.inference.shared import rank_and_size

        join_processes(arguments.launcher)
        if rank_and_size()[0] != 0:  # frames follow one another with memory: there is nothing to share
            return
    if kind == "images":
        predict_recording(arguments)
        return
    if arguments.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {arguments.out}: the picture is a PNG; give a name that ends in .png")
    if arguments.dataroot:
        if missing := [name for name in ("version", "split") if getattr(arguments, name) is None]:
            raise ConfigError(f"--{missing[0]} is missing: with --dataroot give --version and --split too")
        check_dataset(arguments.dataroot, arguments.version)
    if arguments.index is not None and arguments.sample is not None:
        raise ConfigError("--index and --sample both choose the entry of the info file; leave one out")

    from perception.inference.acceleration import accelerated
    from perception.models.checkpoint import load_model, read_provenance
    from perception.models.provenance import weights_of
    from perception.types import map_tensors
    from perception.visualization.pictures import draw_frame

    model = accelerated(load_model(arguments.checkpoint), precision=arguments.precision)
    provenance = read_provenance(arguments.checkpoint)
    sample, clip, scene, cameras = (predict_info if arguments.info else predict_sample)(model, arguments)
    clip = map_tensors(lambda tensor: tensor[0, 0], clip)
    scene = shown(scene, arguments.min_score, arguments.min_seen)
    notes = []
    if provenance is not None:
        if provenance.is_generated and (arguments.info or arguments.version != provenance.versions[0]):
            notes.append("the weights were trained on generated scenes only and are of no use on real images")
        frames = clip.frames
        seconds = float(frames.seconds_since_prev)
        notes += provenance.misfit(frames.rig, model.config.image_size, seconds).values()
    picture = draw_frame(
        clip.frames, scene.objects, clip.gt,
        cameras=cameras, caption=sample, note=notes[0] if notes else "", seen=scene.seen, min_score=0.0,
    )  # fmt: skip
    with replacing(arguments.out) as temporary:
        picture.save(temporary, "PNG")
    if arguments.json:
        info = scene.info._replace(weights=weights_of(arguments.checkpoint, provenance))
        with replacing(arguments.json) as temporary:
            temporary.write_text(scene._replace(warnings=tuple(notes), info=info).to_json() + "\n", encoding="utf-8")
    print(f"{'':8s}{'predicted':>10s}{'true':>8s}{'matched':>10s}")
    pairs = (scene.boxes, clip.gt.boxes), (scene.lines, clip.gt.lines)
    for kind, (predicted, gt), matched in zip(("boxes", "lines"), pairs, count_matches(scene, clip.gt), strict=True):
        print(f"{kind:8s}{len(predicted.score):>10d}{int(gt.valid.sum()):>8d}{matched:>10d}")
    print("matched: same class and centre within 2 m (boxes), same class and Chamfer distance within 1 m (lines)")
    print(f"weights: {provenance or 'their file does not say what they were trained on'}")
    print(f"precision: {model.choice}")
    for note in notes:
        print(f"note: {note}")
