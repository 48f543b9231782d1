"""Lane-map AP against the published evaluator's numbers, closed forms and properties that must hold."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from perception.errors import ConfigError, DataError
from perception.evaluation.lanes import (
    LANE_PROTOCOLS,
    STRICT_THRESHOLDS,
    evaluate_lanes,
    lane_rules,
    match_lines,
)
from perception.types import LINE_CLASSES, LaneRange, MapLine

HERE = Path(__file__).parent


def read_case(frames):
    """Predictions and ground truth of a case in the golden layout."""

    def lines(items):
        return [
            MapLine(LINE_CLASSES.index(item["cls"]), np.array(item["pts"], dtype=np.float64), item.get("score", 1.0))
            for item in items
        ]

    return {f["token"]: lines(f["pred"]) for f in frames}, {f["token"]: lines(f["gt"]) for f in frames}


def line(points, label="divider", score=1.0):
    return MapLine(LINE_CLASSES.index(label), np.array(points, dtype=np.float64), score)


def options_of(protocol):
    """Protocol, lane range and thresholds of a golden protocol; thresholds only where they are not its own."""
    protocol, _, rest = protocol.partition("_")
    if rest == "strict":
        return {"protocol": protocol, "thresholds": STRICT_THRESHOLDS}
    return {"protocol": protocol, "lane_range": LaneRange.parse(rest)} if rest else {"protocol": protocol}


def assert_equals_golden(result, expected):
    assert list(result.thresholds) == expected["thresholds"]
    for name in LINE_CLASSES:
        for threshold in expected["thresholds"]:
            t = str(threshold)
            wanted = expected["AP"][name][t] if "AP" in expected else expected["per_threshold"][t]["AP"][name]
            assert result.ap[name][threshold] == pytest.approx(wanted, abs=1e-6), (name, threshold)
        assert result.class_ap[name] == pytest.approx(expected["AP_per_class"][name], abs=1e-6)
    assert result.mean_ap == pytest.approx(expected["mAP"], abs=1e-6)
    assert result.gt_count == expected["num_gts"]
    assert result.prediction_count == expected["num_preds"]


def hand_case():
    data = json.loads((HERE / "golden" / "map_eval_hand.json").read_text())
    return data, *read_case(data["frames"])


def golden_flavours(golden):
    """Every case and protocol of the golden file, with frames, numbers and how to ask for them."""
    cases = json.loads((golden / "map_eval" / "polylines.json").read_text())["cases"]
    for case, protocols in json.loads((golden / "map_eval" / "expected.json").read_text()).items():
        for protocol, expected in protocols.items():
            yield f"{case} {protocol}", cases[case], expected, options_of(protocol)


@pytest.mark.parametrize("protocol", ["maptr", "maptr_strict"])
def test_published_numbers_of_the_hand_checked_case(protocol):
    data, predictions, gt = hand_case()
    assert_equals_golden(evaluate_lanes(predictions, gt, **options_of(protocol)), data["expected"][protocol])


def test_published_numbers(golden):
    names = []
    for name, frames, expected, options in golden_flavours(golden):
        predictions, gt = read_case(frames)
        assert_equals_golden(evaluate_lanes(predictions, gt, **options), expected)
        names.append(name)
    assert {name.split()[1] for name in names} >= {"maptr", "maptr_strict", "streammapnet_60x30", "streammapnet_100x50"}


def test_published_flags_and_distances_of_every_prediction(golden):
    for name, frames, expected, options in golden_flavours(golden):
        predictions, gt = read_case(frames)
        for number, frame in enumerate(frames):
            matches = match_lines(predictions[frame["token"]], gt[frame["token"]], **options)
            for k, threshold in enumerate(expected["thresholds"]):
                wanted = expected["flags"][str(threshold)][number]
                assert matches.hit[:, k].astype(int).tolist() == wanted, (name, number, threshold)
            best = zip(expected["best_distance"][number], expected["best_gt"][number], strict=True)
            for distance, closest, (wanted, index) in zip(matches.distance, matches.closest, best, strict=True):
                # What lies beyond every threshold is not worked out.
                near = wanted is not None and wanted <= max(expected["thresholds"])
                assert closest == (index if near else -1), (name, number)
                assert distance == (pytest.approx(wanted, abs=1e-6) if near else np.inf)


def test_divider_values_by_hand():
    _, predictions, gt = hand_case()
    result = evaluate_lanes(predictions, gt)
    assert result.ap["divider"] == pytest.approx({0.5: 1 / 3, 1.0: 1 / 2, 1.5: 11 / 12})
    strict = evaluate_lanes(predictions, gt, thresholds=STRICT_THRESHOLDS)
    assert strict.ap["divider"][0.2] == pytest.approx(1 / 9)


def straight(y, score=1.0):
    return MapLine(0, np.array([[-10.0, y], [10.0, y]]), score)


@pytest.mark.parametrize("protocol", ["maptr", "streammapnet"])
def test_a_line_at_exactly_the_threshold_is_a_hit(protocol):
    for k, threshold in enumerate((0.5, 1.0, 1.5)):
        for offset, first in ((threshold, k), (np.nextafter(threshold, 2), k + 1)):
            matches = match_lines([straight(offset)], [straight(0.0)], protocol=protocol)
            assert matches.hit[0].tolist() == [j >= first for j in range(3)], (threshold, offset)
            assert matches.distance[0] == (offset if first < 3 else np.inf)


def test_thresholds_are_those_of_the_published_evaluators():
    assert (
        lane_rules("maptr", LaneRange(60.0, 30.0))[1] == lane_rules("maptr", LaneRange(90.0, 40.0))[1] == (0.5, 1, 1.5)
    )
    assert lane_rules("streammapnet", LaneRange(60.0, 30.0))[1] == (0.5, 1.0, 1.5)
    assert lane_rules("streammapnet", LaneRange(100.0, 50.0))[1] == (1.0, 1.5, 2.0)
    assert STRICT_THRESHOLDS == (0.2, 0.5, 1.0)


@pytest.mark.parametrize("protocol", ["maptr", "streammapnet"])
def test_lines_whose_boxes_are_at_the_largest_threshold_are_compared(protocol):
    upright = MapLine(0, np.array([[0.0, -10], [0, 10]]), 1.0)
    beside = MapLine(0, np.array([[1.5, -10], [1.5, 10]]), 1.0)
    assert match_lines([beside], [upright], protocol=protocol).distance[0] == 1.5


def test_predictions_and_their_errors_belong_together_over_many_frames():
    """The lines above the score are 0.3 m off, the others 0.6 m; frames are tallied in parts."""
    gt = {f"{k:03d}": [straight(0.0)] for k in range(120)}
    sure = {f"{k:03d}": k % 3 == 0 for k in range(120)}
    found = {token: [straight(0.3, 0.9) if sure[token] else straight(0.6, 0.2)] for token in gt}
    point = evaluate_lanes(found, gt, score_threshold=0.5).operating_points["divider"]
    assert (point.error, point.median_error) == pytest.approx((0.3, 0.3))
    assert (point.precision, point.recall, point.bins[0].recall) == pytest.approx((1, 1 / 3, 1 / 3))


def test_progress_counts_all_frames(capfd):
    gt = {f"{k:03d}": [straight(0.0)] for k in range(120)}
    result = evaluate_lanes(gt, gt, progress=True)
    bar = capfd.readouterr().err
    assert "120/120" in bar and "lane maps" in bar
    assert evaluate_lanes(gt, gt) == result and capfd.readouterr().err == ""
    assert result.operating_points["divider"].score == 1


def test_of_equal_scores_the_first_counts_first():
    # Both lines are near enough: the first one is the hit, although the second one is nearer.
    assert match_lines([straight(0.4, 0.5), straight(0.1, 0.5)], [straight(0.0)]).hit[:, 0].tolist() == [True, False]
    # Frames are ordered by token. The hit first: precision 1 at recall 1/2. The false line first: precision 1/2 there.
    gt = {token: [straight(0.0)] for token in ("a", "b")}
    hit, false = [straight(0.0, 0.5)], [straight(8.0, 0.5)]
    for predictions, ap in (({"b": false, "a": hit}, 1 / 2), ({"b": hit, "a": false}, 1 / 4)):
        result = evaluate_lanes(predictions, gt)
        assert result.ap["divider"] == pytest.approx(dict.fromkeys((0.5, 1.0, 1.5), ap))


def random_lines(rng, count, score=True):
    lines = []
    for _ in range(count):
        start, angle = rng.uniform(-15, 15, 2), rng.uniform(0, 2 * np.pi)
        along = np.linspace(0, rng.uniform(1, 20), rng.integers(2, 12))
        points = start + along[:, None] * [np.cos(angle), np.sin(angle)] + rng.normal(0, 0.2, (len(along), 2))
        lines.append(MapLine(int(rng.integers(3)), points, float(rng.uniform()) if score else 1.0))
    return lines


def random_stubs(rng, count, score=True):
    """Short pieces of a few parallel streets, end to end with gaps: near, but often beyond each other's flat caps."""
    lines = []
    for _ in range(count):
        start, length = np.array([rng.uniform(0, 8), 5.0 * rng.integers(2)]), rng.uniform(0.1, 1.2)
        points = start + np.linspace(0, length, 4)[:, None] * [1.0, 0.0] + rng.normal(0, 0.02, (4, 2))
        lines.append(MapLine(int(rng.integers(3)), points, float(rng.uniform()) if score else 1.0))
    return lines


def noisy_map(rng, frames=12, make=random_lines, noise=0.4):
    gt = {f"t{i:02d}": make(rng, 8, score=False) for i in range(frames)}
    predictions = {
        token: [
            MapLine(
                l.label, l.points + rng.normal(0, noise, l.points.shape) + rng.normal(0, 0.5, 2), float(rng.uniform())
            )
            for l in lines
        ]
        + make(rng, 4)
        for token, lines in gt.items()
    }
    return predictions, gt


@pytest.mark.parametrize("protocol", LANE_PROTOCOLS)
@pytest.mark.parametrize(("make", "noise"), [(random_lines, 0.4), (random_stubs, 0.02)])
def test_agrees_with_a_plain_loop_over_all_pairs(make, noise, protocol):
    """The short cuts (bounds, buffers of near pairs only) must not change anything: compare with the long way."""
    import shapely

    predictions, gt = noisy_map(np.random.default_rng(3), frames=8, make=make, noise=noise)
    count_points = {"maptr": 100, "streammapnet": 200}[protocol]
    apart = []

    def resample(points):
        string = shapely.LineString(points)
        return np.array([string.interpolate(s).coords[0] for s in np.linspace(0, string.length, count_points)])

    def slow_ap(label, threshold):
        found, scores, count = [], [], 0
        for token in gt:
            trues = [resample(l.points) for l in gt[token] if l.label == label]
            taken = set()
            count += len(trues)
            for l in sorted((l for l in predictions[token] if l.label == label), key=lambda l: -l.score):
                points, best, best_index = resample(l.points), 100.0, None
                area = shapely.LineString(points).buffer(2, cap_style="flat", join_style="mitre")
                for index, other in enumerate(trues):
                    pairwise = cdist(points, other)
                    distance = (pairwise.min(1).mean() + pairwise.min(0).mean()) / 2
                    other_area = shapely.LineString(other).buffer(2, cap_style="flat", join_style="mitre")
                    touch = protocol != "maptr" or area.intersects(other_area)
                    apart.append(distance <= threshold and not touch)
                    if touch and distance < best:
                        best, best_index = distance, index
                hit = best <= threshold and best_index not in taken
                taken |= {best_index} if hit else set()
                found.append(hit)
                scores.append(l.score)
        found = np.array(found)[np.argsort(-np.array(scores))]
        recall = np.concatenate([[0], np.cumsum(found) / count, [1]])
        precision = np.concatenate([[0], np.cumsum(found) / np.arange(1, len(found) + 1), [0]])
        for i in range(len(precision) - 1, 0, -1):
            precision[i - 1] = max(precision[i - 1], precision[i])
        return sum((recall[i + 1] - recall[i]) * precision[i + 1] for i in range(len(recall) - 1))

    result = evaluate_lanes(predictions, gt, protocol=protocol)
    for label, name in enumerate(LINE_CLASSES):
        for threshold in result.thresholds:
            assert result.ap[name][threshold] == pytest.approx(slow_ap(label, threshold), abs=1e-9)
    assert 0.1 < result.mean_ap < 0.9
    if protocol == "maptr" and make is random_stubs:
        assert sum(apart) > 10  # the case is one in which the buffers decide


def test_chamfer_distance_in_closed_form():
    # Two parallel lines 1 m apart, one half as long: the long one's far half adds sqrt(1 + s^2) over s in 0..10.
    far_half = (10 * np.sqrt(101) + np.arcsinh(10)) / 2 / 10
    expected = (1 + (1 + far_half) / 2) / 2
    short, long = [line([[0, 0], [10, 0]])], [line([[0, 1], [20, 1]])]
    for protocol, tolerance in (("maptr", 1e-2), ("streammapnet", 5e-3)):  # of 100 and of 200 points
        found = match_lines(short, long, protocol=protocol, thresholds=(5.0,)).distance
        assert found == pytest.approx([expected], rel=tolerance)


def test_perfect_predictions_score_one():
    gt = {
        "a": [line([[0, -10], [0, 10]]), line([[3, 0], [6, 0], [6, 2], [3, 2], [3, 0]], "ped_crossing")],
        "b": [line([[5, -10], [5, 3], [9, 10]], "boundary")],
    }
    assert evaluate_lanes(gt, gt, thresholds=(0.01, 1.5)).mean_ap == 1.0


def test_collinear_lines_whose_flat_buffers_do_not_touch_never_match():
    # The ends lie 0.5 m apart and the mean distance is 1 m, but buffers with flat caps leave the gap open.
    gt = {"a": [line([[0, 0], [1, 0]])]}
    predictions = {"a": [line([[1.5, 0], [2.5, 0]])]}
    assert evaluate_lanes(predictions, gt).ap["divider"][1.5] == 0.0
    assert evaluate_lanes(predictions, gt, protocol="streammapnet").ap["divider"][1.5] == 1.0  # asks no buffers
    beside = {"a": [line([[0, 1.2], [1, 1.2]])]}
    assert evaluate_lanes(beside, gt).ap["divider"][1.5] == 1.0


@pytest.mark.parametrize(("gap", "touches"), [(1.8, True), (1.94, True), (2.02, False), (2.08, False)])
def test_a_line_end_just_beyond_the_buffer_does_not_touch_it(gap, touches):
    """A short line stands upright over the middle of another: its own flat buffer does not reach down to it."""
    gt, upright = [line([[-1, 0], [1, 0]])], [line([[0.003, gap], [0.003, gap + 0.06]])]
    for a, b in ((upright, gt), (gt, upright)):
        assert np.isfinite(match_lines(a, b, thresholds=(5.0,)).distance).all() == touches


def test_a_prediction_has_no_second_choice():
    # Both predictions are closest to the same line; the weaker one may not fall back on the other, though it is near.
    gt = {"a": [line([[0, 0], [0, 10]]), line([[1.2, 0], [1.2, 10]])]}
    predictions = {"a": [line([[0.1, 0], [0.1, 10]], score=0.9), line([[0.4, 0], [0.4, 10]], score=0.8)]}
    assert evaluate_lanes(predictions, gt).ap["divider"] == pytest.approx({0.5: 0.5, 1.0: 0.5, 1.5: 0.5})


def test_number_of_points_by_a_ring_that_starts_half_a_step_later():
    # A square of 40 m: the 100 points lie 40/99 = 0.404 m apart, so a start 0.202 m later puts every point halfway
    # between two of the other ring's. The 200 points lie 40/199 = 0.201 m apart, and every point meets another.
    corners = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    shift = 40 / 99 / 2
    later = np.concatenate([[[shift, 0]], corners[1:], corners[:1], [[shift, 0]]])
    gt = {"a": [line(corners[[0, 1, 2, 3, 0]], "ped_crossing")]}
    predictions = {"a": [line(later, "ped_crossing")]}
    for protocol, distance in (("maptr", shift), ("streammapnet", abs(shift - 40 / 199))):
        found = match_lines(predictions["a"], gt["a"], protocol=protocol).distance[0]
        assert found == pytest.approx(distance, abs=0.01)
        assert evaluate_lanes(predictions, gt, protocol=protocol, thresholds=(0.1,)).mean_ap * 3 == (distance < 0.1)


@pytest.mark.parametrize("protocol", LANE_PROTOCOLS)
def test_direction_of_lines_and_order_of_frames_do_not_matter(protocol):
    rng = np.random.default_rng(5)
    predictions, gt = noisy_map(rng)
    base = evaluate_lanes(predictions, gt, protocol=protocol)
    reversed_lines = {t: [l._replace(points=l.points[::-1]) for l in lines] for t, lines in predictions.items()}
    turned = evaluate_lanes(reversed_lines, gt, protocol=protocol)
    for name in LINE_CLASSES:
        assert turned.ap[name] == pytest.approx(base.ap[name], abs=1e-9)
        assert turned.operating_points[name].error == pytest.approx(base.operating_points[name].error, abs=1e-9)
    # Equal scores are the hard case for a shuffled split: give every prediction the same one.
    flat = {t: [l._replace(score=0.5) for l in lines] for t, lines in predictions.items()}
    shuffled = {t: flat[t] for t in rng.permutation(list(flat))}
    shuffled_gt = {t: gt[t] for t in rng.permutation(list(gt))}
    result = evaluate_lanes(flat, gt, protocol=protocol)
    assert evaluate_lanes(shuffled, shuffled_gt, protocol=protocol) == result and 0 < result.mean_ap < 1


def test_number_of_processes_does_not_matter():
    predictions, gt = noisy_map(np.random.default_rng(6), frames=120)  # more than a process gets at a time
    alone, shared = (evaluate_lanes(predictions, gt, workers=workers) for workers in (0, 2))
    assert shared == alone and 0.1 < alone.mean_ap < 0.9
    broken = {**predictions, "t07": [line([[0, 0]])]}
    with pytest.raises(DataError, match="sample t07"):
        evaluate_lanes(broken, gt, workers=1)


@pytest.mark.parametrize("protocol", LANE_PROTOCOLS)
def test_start_of_a_ring_and_its_direction_do_not_matter(protocol):
    """Rings of as many equal edges as there are steps between the points, so that every start gives the same points."""
    rng = np.random.default_rng(7)
    edges = LANE_PROTOCOLS[protocol].points - 1
    angle = np.arange(edges) * 2 * np.pi / edges

    def rings(shift, score):
        centers = [np.array([x, y]) for x in (-20.0, 0.0, 20.0) for y in (-8.0, 8.0)]
        return [
            line(c + rng.uniform(-shift, shift, 2) + 3 * np.stack([np.cos(angle), np.sin(angle)], 1), score=score())
            for c in centers
        ]

    def closed(lines, start, step):
        return [l._replace(points=np.roll(l.points, -start, 0)[::step][np.r_[:edges, 0]]) for l in lines]

    gt = {f"t{i}": closed(rings(0, lambda: 1.0), 0, 1) for i in range(5)}
    guesses = {token: rings(1.8, lambda: float(rng.uniform())) for token in gt}
    scores = [
        evaluate_lanes({t: closed(l, start, step) for t, l in guesses.items()}, gt, protocol=protocol)
        for start, step in ((0, 1), (0, -1), (edges // 2, 1), (17, -1))
    ]
    assert 0.05 < scores[0].mean_ap < 0.3  # of one class in three
    assert all(score.ap == scores[0].ap for score in scores)


def test_start_vertex_of_a_ring_hardly_matters():
    # The samples slide along the ring by at most half their spacing of 22 m / 99.
    ring = np.array([[0, 0], [8, 0], [8, 3], [0, 3]], dtype=np.float64)
    gt = {"a": [line(ring[[0, 1, 2, 3, 0]], "ped_crossing")]}
    for start in range(4):
        points = np.roll(ring, -start, axis=0)
        predictions = {"a": [line(np.concatenate([points, points[:1]]), "ped_crossing")]}
        assert evaluate_lanes(predictions, gt, thresholds=(22 / 99 / 2 + 0.01,)).class_ap["ped_crossing"] == 1.0


def test_bad_input_names_the_sample():
    good = {"tok": [line([[0, 0], [1, 1]])]}
    for bad in ([[0, 0]], [[0, 0], [np.nan, 1]], [[0, 0, 0], [1, 1, 1]]):
        with pytest.raises(DataError, match="sample tok"):
            evaluate_lanes({"tok": [line(bad)]}, good)
        with pytest.raises(DataError, match="sample tok"):
            evaluate_lanes(good, {"tok": [line(bad)]})
    with pytest.raises(DataError, match="sample tok"):
        evaluate_lanes({"tok": [MapLine(7, np.zeros((2, 2)))]}, good)
    with pytest.raises(DataError, match="lack 1 of 1"):
        evaluate_lanes({}, good)
    with pytest.raises(DataError, match="other"):
        evaluate_lanes({**good, "other": []}, good)
    with pytest.raises(DataError, match="empty"):
        evaluate_lanes({}, {})
    with pytest.raises(ConfigError, match="thresholds"):
        evaluate_lanes(good, good, thresholds=(0.0,))


def test_impossible_options_are_refused():
    good = {"tok": [line([[0, 0], [1, 1]])]}
    for options, said in (
        ({"protocol": "mapr"}, "'mapr'; choose one of maptr, streammapnet"),
        (
            {"protocol": "streammapnet", "lane_range": LaneRange(30.0, 60.0)},
            "streammapnet has no range 30x60; give one of 60x30, 100x50",
        ),
        ({"thresholds": ()}, "thresholds"),
        ({"thresholds": (0.5, 0.5)}, "thresholds"),
        ({"score_threshold": np.nan}, "finite"),
        ({"score_threshold": {"divider": 0.5}}, "one for each"),
    ):
        with pytest.raises(ConfigError, match=said):
            evaluate_lanes(good, good, **options)


# Run in a process of its own, whose peak of memory is that of the evaluation alone.
BENCHMARK = """
import re, resource, sys
from pathlib import Path
import numpy as np
from perception.evaluation.lanes import evaluate_lanes
from perception.types import MapLine

def main():
    rng = np.random.default_rng(0)
    predictions, gt = {}, {}
    for frame in range(2000):
        heading = rng.uniform(0, 2 * np.pi, (50, 1)) + np.cumsum(rng.normal(0, 0.05, (50, 20)), 1)
        steps = rng.uniform(0.3, 2.0, (50, 1, 1)) * np.stack([np.cos(heading), np.sin(heading)], -1)
        points = rng.uniform((-30, -15), (30, 15), (50, 2))[:, None] + np.cumsum(steps, 1)  # [50, 20, 2]
        off = points + rng.normal(0, 0.5, (50, 1, 2)) + rng.normal(0, 0.1, points.shape)
        gt[f"{frame:05d}"] = [MapLine(k % 3, points[k]) for k in range(50)]
        predictions[f"{frame:05d}"] = [MapLine(k % 3, off[k], float(rng.uniform())) for k in range(50)]
    def processor_seconds():
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    start = processor_seconds()
    result = evaluate_lanes(predictions, gt, protocol=sys.argv[1], workers=2)
    seconds = (processor_seconds() - start) / 2  # on two cores that do nothing else
    # Its ru_maxrss would be at least that of the process that started it: exec() takes that over, but not VmHWM.
    peak_kib = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    # The peak of the children is that of the larger one, and there are two.
    peak_kib += 2 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(seconds, peak_kib / 2**20, result.mean_ap)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("protocol", LANE_PROTOCOLS)
def test_two_thousand_samples_of_fifty_lines_take_less_than_a_minute(protocol, tmp_path):
    """On two cores, in less than 2 GiB."""
    script = tmp_path / "benchmark.py"  # worker processes want to import it
    script.write_text(BENCHMARK)
    run = subprocess.run([sys.executable, script, protocol], capture_output=True, text=True, check=True)
    seconds, peak_gib, mean_ap = map(float, run.stdout.split())
    print(f"{protocol}: {seconds:.1f} s, {peak_gib:.2f} GiB")
    assert seconds < 60
    assert peak_gib < 2
    assert 0.5 < mean_ap < 1
