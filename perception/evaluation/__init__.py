"""Evaluation: boxes by the official nuScenes devkit, lanes by both published protocols, and further reports.

The names below need no devkit. Boxes are in `detection`, whole datasets in `dataset`; `stability`, `confidence` and
`robustness` hold the further reports.
"""

from perception.evaluation.lane_report import LaneResult
from perception.evaluation.lanes import evaluate_lanes, match_lines
from perception.evaluation.submission import read_submission, write_lanes

__all__ = ["LaneResult", "evaluate_lanes", "match_lines", "read_submission", "write_lanes"]
