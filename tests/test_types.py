"""Lane ranges as texts, and functions on all tensors of nested types."""

import pytest
import torch

from perception.cameras import usual_mounting
from perception.errors import ConfigError
from perception.types import DEFAULT_LANE_RANGE, CameraRig, Frame, LaneRange, MapLine, map_tensors


@pytest.mark.parametrize("text, sides", [("60x30", (60, 30)), ("102.4x51.2", (102.4, 51.2)), ("0.5x1", (0.5, 1))])
def test_lane_ranges_are_read_and_written(text, sides):
    parsed = LaneRange.parse(text)
    assert parsed == sides and all(type(side) is float for side in parsed)
    assert str(parsed) == text
    assert str(DEFAULT_LANE_RANGE) == "60x30"


@pytest.mark.parametrize("text", ["60", "60x", "60x0", "0x30", "0.0x30", "-60x30", "60 x 30", "60x30x2", "ax30", ""])
def test_what_is_no_lane_range_is_named(text):
    with pytest.raises(ConfigError, match=f"the lane range is {text!r}; write metres"):
        LaneRange.parse(text)


def test_functions_apply_to_all_tensors_and_keep_the_types():
    rig = CameraRig(torch.ones(2, 6, 3, 3), torch.ones(2, 6, 4, 4), torch.ones(2, 6))
    frame = Frame(
        torch.ones(2, 6, 3, 4, 5), rig, torch.ones(2, 4, 4), torch.zeros(2), torch.ones(2), *usual_mounting(2, 6)
    )
    second = map_tensors(lambda tensor: 3 * tensor[1], frame)
    assert type(second) is Frame and type(second.rig) is CameraRig
    assert second.images.shape == (6, 3, 4, 5) and second.rig.present.tolist() == [3] * 6
    assert second.seconds_since_prev == 0


def test_the_score_of_ground_truth_is_one():
    assert MapLine(0, torch.zeros(2, 2).numpy()).score == 1
