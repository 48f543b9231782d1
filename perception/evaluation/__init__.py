"""Scores of predictions: boxes by the official nuScenes devkit, lanes by both published protocols, and steadiness.

What is named here needs no devkit. Boxes are in `detection`, whole datasets in `streaming`, steadiness in `stability`.
"""

from perception.evaluation.lane_report import LaneResult
from perception.evaluation.lanes import evaluate_lanes, match_lines
from perception.evaluation.submission import read_submission, write_lanes

__all__ = ["LaneResult", "evaluate_lanes", "match_lines", "read_submission", "write_lanes"]
