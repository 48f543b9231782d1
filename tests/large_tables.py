"""Writes tables of the size of nuScenes trainval, to measure how datasets are read: 850 scenes of 40 keyframes.

    perception simulate --out out/routes --scenes 4 --seed 7 --keyframes 40 --split town_try --image-size 32x56
    python tests/large_tables.py out/routes out/large

The scenes drive the routes of a generated town, whose maps are linked. Twelve sensors have sweeps at the rates of
nuScenes (cameras 12 Hz, LiDAR 20 Hz, radars 13 Hz), which makes 2.61 million files with a pose each, and 1.19 million
boxes. There are no images.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from perception.synthetic import VERSION

KEYFRAMES, STEP = 40, 500_000  # per scene; microseconds between them
RATES = {"CAM": 6, "LIDAR": 10, "RADAR": 6.5}  # files in the time from keyframe to keyframe
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")
BOXES = 35  # of a sample
LIFE = 20  # keyframes that an instance exists


def tokens(count: int) -> list[str]:
    text = os.urandom(16 * count).hex()
    return [text[i : i + 32] for i in range(0, 32 * count, 32)]


def write(path: Path, records: Iterator[str]) -> None:
    """Writes a table as nuScenes does: a key a line."""
    with path.open("w") as file:
        file.write("[\n")
        file.write(next(records))
        for record in records:
            file.write(",\n" + record)
        file.write("\n]")


def linked(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yields each name with the ones before and after it."""
    return zip(names, ["", *names[:-1]], [*names[1:], ""], strict=True)


def main(town: Path, root: Path, scenes: int = 850, seed: int = 0) -> None:
    """Writes the tables below `root`."""
    rng = np.random.default_rng(seed)
    read: Callable[[str], list[dict]] = lambda table: json.loads((town / VERSION / f"{table}.json").read_text())  # noqa: E731
    folder = root / VERSION
    folder.mkdir(parents=True)
    (root / "maps").symlink_to((town / "maps").resolve())
    for table in ("category", "attribute", "visibility", "map"):
        (folder / f"{table}.json").write_text((town / VERSION / f"{table}.json").read_text())
    categories = {row["name"]: row["token"] for row in read("category")}
    attributes = {row["name"]: row["token"] for row in read("attribute")}
    kinds = [("vehicle.car", "vehicle.parked")] * 5 + [("human.pedestrian.adult", "pedestrian.moving")] * 3
    kinds += [("movable_object.barrier", ""), ("movable_object.trafficcone", ""), ("vehicle.truck", "vehicle.moving")]
    sensors = read("sensor") + [{"token": name, "channel": name, "modality": "radar"} for name in RADARS]
    (folder / "sensor.json").write_text(json.dumps(sensors, indent=0))
    (folder / "log.json").write_text(json.dumps(read("log"), indent=0))

    # The routes: times and poses of the keyframes of each scene of the town.
    pose_of = {row["token"]: row for row in read("ego_pose")}
    sample_of = {row["token"]: row for row in read("sample")}
    sensor_of = {row["token"]: row for row in sensors}
    calibration_of = {row["token"]: row for row in read("calibrated_sensor")}
    routes, calibrations = {}, {}
    for row in read("sample_data"):
        calibration = calibration_of[row["calibrated_sensor_token"]]
        channel = sensor_of[calibration["sensor_token"]]["channel"]
        scene = sample_of[row["sample_token"]]["scene_token"]
        calibrations.setdefault(scene, {})[channel] = calibration
        if channel == "LIDAR_TOP":
            routes.setdefault(scene, []).append((row["timestamp"], pose_of[row["ego_pose_token"]]))
    town_scenes = read("scene")

    scene_tokens = tokens(scenes)
    sample_tokens = [tokens(KEYFRAMES) for _ in range(scenes)]
    start = [1_500_000_000_000_000 + 30_000_000 * k for k in range(scenes)]
    channels = [row["channel"] for row in sensors]
    files = {channel: round(RATES[channel.split("_")[0]] * (KEYFRAMES - 1)) + 1 for channel in channels}
    file_tokens = [{channel: tokens(files[channel]) for channel in channels} for _ in range(scenes)]
    calibration_tokens = [dict(zip(channels, tokens(len(channels)), strict=True)) for _ in range(scenes)]

    def route(scene: int) -> list[dict]:
        poses = sorted(routes[town_scenes[scene % len(town_scenes)]["token"]], key=lambda item: item[0])
        return [pose for _, pose in poses]

    def times(scene: int, channel: str) -> tuple[np.ndarray, np.ndarray]:
        """Microseconds of each file, and the number of the keyframe interval that holds it."""
        early = 0 if channel == "LIDAR_TOP" else 1000 + 3000 * channels.index(channel)
        share = np.linspace(0, KEYFRAMES - 1, files[channel]).round(9)
        return (start[scene] + share * STEP).astype(np.int64) - early, share

    def scene_rows() -> Iterator[str]:
        for k in range(scenes):
            like = town_scenes[k % len(town_scenes)]
            yield json.dumps(
                {
                    "token": scene_tokens[k], "log_token": like["log_token"], "nbr_samples": KEYFRAMES,
                    "first_sample_token": sample_tokens[k][0], "last_sample_token": sample_tokens[k][-1],
                    "name": f"scene-{k:04d}", "description": "Parked cars, a crossing, pedestrians.",
                }, indent=0,
            )  # fmt: skip

    def sample_rows() -> Iterator[str]:
        for k in range(scenes):
            for n, (token, before, after) in enumerate(linked(sample_tokens[k])):
                yield (
                    f'{{\n"token": "{token}",\n"timestamp": {start[k] + n * STEP},\n"prev": "{before}",\n'
                    f'"next": "{after}",\n"scene_token": "{scene_tokens[k]}"\n}}'
                )

    def calibration_rows() -> Iterator[str]:
        token_of_channel = {row["channel"]: row["token"] for row in sensors}
        for k in range(scenes):
            given = calibrations[town_scenes[k % len(town_scenes)]["token"]]
            for channel in channels:
                like = given.get(channel) or {"translation": [3.4, 0.0, 0.5], "rotation": [1.0, 0.0, 0.0, 0.0]}
                own = {"token": calibration_tokens[k][channel], "sensor_token": token_of_channel[channel]}
                yield json.dumps({"camera_intrinsic": [], **like, **own}, indent=0)

    def data_rows() -> Iterator[str]:
        for channel in channels:
            camera, kind = channel.startswith("CAM"), "jpg" if channel.startswith("CAM") else "pcd"
            size = (32, 56) if camera else (0, 0)
            for k in range(scenes):
                micros, share = times(k, channel)
                key, calibration = share % 1 == 0, calibration_tokens[k][channel]
                owner = np.ceil(share).astype(int)
                for n, (token, before, after) in enumerate(linked(file_tokens[k][channel])):
                    where = "samples" if key[n] else "sweeps"
                    yield (
                        f'{{\n"token": "{token}",\n"sample_token": "{sample_tokens[k][owner[n]]}",\n'
                        f'"ego_pose_token": "{token}",\n"calibrated_sensor_token": "{calibration}",\n'
                        f'"timestamp": {micros[n]},\n"fileformat": "{kind}",\n'
                        f'"is_key_frame": {"true" if key[n] else "false"},\n"height": {size[0]},\n"width": {size[1]},\n'
                        f'"filename": "{where}/{channel}/n008-2018-08-01-15-16-36-0400__{channel}__{micros[n]}.{kind}",'
                        f"\n"
                        f'"prev": "{before}",\n"next": "{after}"\n}}'
                    )

    def pose_rows() -> Iterator[str]:
        for k in reversed(range(scenes)):
            poses = route(k)
            position = np.array([pose["translation"] for pose in poses])
            rotation = [str(pose["rotation"]).replace(", ", ",\n") for pose in poses]
            for channel in channels:
                micros, share = times(k, channel)
                place = np.stack([np.interp(share, np.arange(KEYFRAMES), position[:, d]) for d in range(3)], 1)
                for n, token in enumerate(file_tokens[k][channel]):
                    x, y, z = place[n].tolist()
                    yield (
                        f'{{\n"token": "{token}",\n"timestamp": {micros[n]},\n"rotation": {rotation[int(share[n])]},\n'
                        f'"translation": [\n{x},\n{y},\n{z}\n]\n}}'
                    )

    instances = []  # token, scene, kind, first keyframe, tokens of its boxes
    for k in range(scenes):
        for first in range(0, KEYFRAMES, LIFE):
            for token in tokens(BOXES):
                instances.append((token, k, kinds[rng.integers(len(kinds))], first, tokens(LIFE)))

    def instance_rows() -> Iterator[str]:
        for token, _, (category, _), _, boxes in instances:
            yield (
                f'{{\n"token": "{token}",\n"category_token": "{categories[category]}",\n"nbr_annotations": {LIFE},\n'
                f'"first_annotation_token": "{boxes[0]}",\n"last_annotation_token": "{boxes[-1]}"\n}}'
            )

    def annotation_rows() -> Iterator[str]:
        for token, k, (_, attribute), first, boxes in instances:
            x, y, z = np.add(route(k)[first]["translation"], [*rng.uniform(-45, 45, 2), 0.8]).tolist()
            dx, dy = rng.uniform(-0.5, 0.5, 2).tolist()
            w, l, h = rng.uniform(0.5, 4.5, 3).round(3).tolist()
            yaw = rng.uniform(0, np.pi)
            rotation = f"[\n{np.cos(yaw)},\n0.0,\n0.0,\n{np.sin(yaw)}\n]"
            named = f'[\n"{attributes[attribute]}"\n]' if attribute else "[]"
            for n, (box, before, after) in enumerate(linked(boxes)):
                yield (
                    f'{{\n"token": "{box}",\n"sample_token": "{sample_tokens[k][first + n]}",\n'
                    f'"instance_token": "{token}",\n"visibility_token": "4",\n"attribute_tokens": {named},\n'
                    f'"translation": [\n{x + n * dx},\n{y + n * dy},\n{z}\n],\n"size": [\n{w},\n{l},\n{h}\n],\n'
                    f'"rotation": {rotation},\n"prev": "{before}",\n"next": "{after}",\n"num_lidar_pts": {n + 1},\n'
                    f'"num_radar_pts": 0\n}}'
                )

    for table, rows in {
        "scene": scene_rows, "sample": sample_rows, "calibrated_sensor": calibration_rows, "sample_data": data_rows,
        "ego_pose": pose_rows, "instance": instance_rows, "sample_annotation": annotation_rows,
    }.items():  # fmt: skip
        write(folder / f"{table}.json", rows())
    (folder / "splits.json").write_text(json.dumps({"large": [f"scene-{k:04d}" for k in range(scenes)]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("town", type=Path, help="a generated town of scenes with 40 keyframes")
    parser.add_argument("root", type=Path, help="folder that is made")
    parser.add_argument("--scenes", type=int, default=850)
    arguments = parser.parse_args()
    main(arguments.town, arguments.root, arguments.scenes)
