"""Seeded mutations of everything that `step` takes: a sentence or a finite result, and never a poisoned memory."""

import warnings

import numpy as np
import pytest

from perception.errors import DataError, PerceptionWarning
from perception.geometry import invert_rigid, is_rigid, rigid_from_yaw

NUMBERS = (0.0, -0.0, -1.0, 1e-39, 1e-9, 0.5, 2.0, 1e3, 1e4, 1e9, -1e9, 1e39, 1e300, np.nan, np.inf, -np.inf)
OTHERS = (
    None,
    "text",
    [],
    {},
    (),
    True,
    1j,
    np.array(["a"]),
    np.zeros(0),
    np.array(None),
    np.float32(1.5),
    b"\0",
    object,
)


def mutated_array(rng, array):
    """Changes numbers, the type or the shape of an array."""
    array = np.array(array, dtype=np.float64)
    match rng.integers(9):
        case 0 | 1 | 2:
            array.flat[rng.integers(array.size)] = rng.choice(NUMBERS)
        case 3:
            array.flat[rng.integers(array.size)] *= 10.0 ** rng.integers(-4, 5)
        case 4:
            array = array * rng.choice(NUMBERS[5:9]) if rng.random() < 0.5 else -array
        case 5:
            array = array.swapaxes(-1, -2)
        case 6:
            array = array[rng.permutation(len(array))]
        case 7:
            shapes = (array[:-1], array[None], array.ravel(), array[..., :-1], array.reshape(array.shape[::-1]))
            array = shapes[rng.integers(len(shapes))]
        case 8:
            kinds = ("float16", "int8", "uint64", "complex64", "object", "str", "bool")
            with np.errstate(all="ignore"):
                array = np.nan_to_num(array).astype(rng.choice(kinds))
    return array


def mutated_rig(rig, rng):
    match rng.choice(6, p=(0.2, 0.2, 0.3, 0.05, 0.15, 0.1)):
        case 0:
            return rig._replace(img_from_cam=mutated_array(rng, rig.img_from_cam))
        case 1:
            return rig._replace(ego_from_cam=mutated_array(rng, rig.ego_from_cam))
        case 2:  # another rotation, another place, another scale of the image
            ego_from_cam, img_from_cam = (np.array(part, np.float64) for part in (rig.ego_from_cam, rig.img_from_cam))
            n = rng.integers(len(ego_from_cam)) if rng.random() < 0.5 else slice(None)
            axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            ego_from_cam[n, :3, :3] = axes * np.sign(np.linalg.det(axes))
            ego_from_cam[n, :3, 3] += rng.normal(size=3) * rng.choice([0, 1, 10])
            img_from_cam[n, :2] *= rng.choice([0.1, 0.5, 1, 2, 10])
            return rig._replace(ego_from_cam=ego_from_cam, img_from_cam=img_from_cam)
        case 3:
            return rig._replace(ego_from_cam=invert_rigid(np.array(rig.ego_from_cam, np.float64)))
        case 4:
            return rig._replace(present=rng.random(len(rig.present)) < rng.choice([0.0, 0.3, 0.8]))
        case _:
            return rig._replace(**{rng.choice(rig._fields): OTHERS[rng.integers(len(OTHERS))]})


def mutated_images(images, rng):
    n, changed = rng.integers(len(images)), list(images)
    image = changed[n]
    options = (
        None, image * 0, image // 128, image[::-1], image[..., ::-1], image[:, :0], image[:-1], image / 255,
        image.transpose(2, 0, 1), image[..., 0], image.tolist()[:1], np.full_like(image, 255), changed[n - 1],
        rng.integers(0, 256, image.shape, dtype=np.uint8), image.astype(np.int16) - 300, image[::2, ::2],
    )  # fmt: skip
    option = options[rng.integers(len(options))]
    if rng.random() < 0.7:
        changed[n] = option
        return changed
    whole = ([option] * len(images), images[:-1], [*images, image], np.stack(images), tuple(images), images[::-1])
    return whole[rng.integers(len(whole))] if rng.random() < 0.8 else OTHERS[rng.integers(len(OTHERS))]


def mutated_pose(pose, rng):
    if rng.random() < 0.6:
        return mutated_array(rng, pose)
    moves = (
        rigid_from_yaw(3.0), rigid_from_yaw(0.1, (40.0, 0, 0)), rigid_from_yaw(0, (1e3, 0, 0)),
        rigid_from_yaw(0, (0, 0, 9e7)), np.diag([1.0, -1, 1, 1]), 2 * np.eye(4),
    )  # fmt: skip
    return pose @ moves[rng.integers(len(moves))] if rng.random() < 0.8 else OTHERS[rng.integers(len(OTHERS))]


def mutated_time(time, rng):
    options = (time - 0.5, time - 10, time + 3, time + 1e-9, -time, time * 1e3, time * 1e6, time * 1e9, 1e10, *NUMBERS)
    return options[rng.integers(len(options))] if rng.random() < 0.8 else OTHERS[rng.integers(len(OTHERS))]


MUTATIONS = (mutated_images, mutated_rig, mutated_pose, mutated_time)


def mutated(frame, rng):
    parts = list(frame)
    for which in rng.choice(4, rng.choice([1, 1, 2]), replace=False, p=(0.2, 0.5, 0.2, 0.1)):
        parts[which] = MUTATIONS[which](parts[which], rng)
    return parts


def step(live, frame):
    """Returns the result, or the sentence of an error; warnings must be of the library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = live.step(*frame)
        except DataError as error:
            assert "\n" not in str(error) and 20 < len(str(error)) < 420, str(error)
            result = str(error)
    assert all(w.category is PerceptionWarning and "\n" not in str(w.message) for w in caught), caught[0]
    return result


def arrays(result) -> list[np.ndarray]:
    return [np.asarray(array) for part in (result.boxes, result.lines, result.seen) for array in part]


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other), strict=True))


def is_usual(rig) -> bool:
    """An independent look at a rig that passed without a warning: upright cameras at usual heights that see ahead."""
    n = np.asarray(rig.present, dtype=bool)
    poses, focal = np.asarray(rig.ego_from_cam, float)[n], np.asarray(rig.img_from_cam, float)[n][:, [0, 1], [0, 1]]
    level = np.abs(poses[:, 2, 2]) < 0.9
    return bool(
        n.any()
        and all(map(is_rigid, poses))
        and ((poses[:, 2, 3] >= 0) & (poses[:, 2, 3] <= 6)).all()
        and (poses[level, 2, 1] < 0).all()
        and (poses[:, 2, 2] <= np.sin(np.radians(30.001))).all()
        and ((focal > 0.1 * 112) & (focal < 6 * 112)).all()
    )


def fuzz(make, live_frames, cases, seed):
    live = make()
    after = {}
    for first in (True, False):  # what frame 2 gives in a fresh predictor, and after frame 0
        live.reset()
        if not first:
            step(live, live_frames[0])
        after[first] = step(live, live_frames[2])
    live.reset()
    step(live, live_frames[0])
    refused = warned = 0
    for case in range(cases):
        frame = mutated(live_frames[1], np.random.default_rng((seed, case)))
        result = step(live, frame)
        if isinstance(result, str):
            refused += 1
            if case % 4:  # the state must be as before, so that the next case starts from frame 0
                continue
            assert same(step(live, live_frames[2]), after[False]), (seed, case, result)
        else:
            assert all(np.isfinite(array).all() for array in arrays(result)), (seed, case)
            assert result.warnings or is_usual(frame[1]), (seed, case)
            warned += bool(result.warnings)
            images, rig, pose, _ = live_frames[2]
            given = live_frames[1][3] if frame[3] is None else frame[3]  # without a time it stands for itself
            following = step(live, (images, rig, pose, float(np.asarray(given)) + 0.5))
            if not isinstance(following, str):  # a time of 1e11 s is the largest, and half a second later is refused
                assert all(np.isfinite(array).all() for array in arrays(following)), (seed, case)
                assert len(following.boxes.score), (seed, case)
                if any("nothing is predicted" in sentence or "not finite" in sentence for sentence in result.warnings):
                    assert same(following, after[True]), (seed, case)
            live.reset()
            assert same(step(live, live_frames[2]), after[True]), (seed, case)
        live.reset()
        step(live, live_frames[0])
    return refused, warned


def test_mutated_input_gives_a_sentence_or_a_finite_result(make_live, live_kind, live_frames):
    refused, warned = fuzz(make_live[live_kind], live_frames, 60, 1)
    assert refused > 20 and warned > 3


@pytest.mark.slow
def test_thousands_of_mutations(make_live, live_kind, live_frames):
    refused, warned = fuzz(make_live[live_kind], live_frames, 800, seed=2)
    assert refused > 300 and warned > 50
