"""Writes docs/api.md: the public names of the library with the first sentence of their docstrings.

    python docs/make_api.py

Reads the source only; nothing is imported.
"""

import ast
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
MODULES = (
    "__init__", "types", "geometry", "cameras", "grid", "errors", "extensions", "inference.predictor",
    "inference.sequence", "inference.shared",
    "inference.ego_motion", "inference.images", "inference.result",
    "rigs.rig", "rigs.importers", "rigs.virtual", "rigs.coverage",
    "models.__init__", "models.base", "models.checkpoint", "models.provenance", "models.bev_transformer.config",
    "models.bev_transformer.model", "models.bevformer.model", "models.maptr.model", "models.maptrv2.model",
    "data.nuscenes", "data.info_files", "data.infos", "data.map_vectors", "data.lane_map", "data.lane_topology",
    "data.splits", "data.leakage", "data.geographic_split", "data.augment", "synthetic.writer", "synthetic.scene",
    "evaluation.dataset", "evaluation.detection",
    "evaluation.lanes", "evaluation.lane_report", "evaluation.stability", "evaluation.confidence",
    "evaluation.robustness", "evaluation.submission", "engine.config", "engine.training", "engine.launchers",
    "engine.weights",
    "export.onnx", "export.contract", "export.dialect", "export.parity", "export.runtime", "export.tensorrt",
    "visualization.pictures", "visualization.live",
)  # fmt: skip


def first_sentence(node: ast.AST) -> str:
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.]) ", text + " ")[0].strip().replace("|", "\\|")


def names_of(tree: ast.Module) -> list[tuple[str, str]]:
    """Public classes and functions of a module in the order of the file, with their first sentences."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [(n.name, first_sentence(n)) for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]


def exported(tree: ast.Module) -> list[str]:
    """The names in `__all__`."""
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]
    return sorted(ast.literal_eval(values[0])) if values else []


def make() -> str:
    """The text of docs/api.md."""
    parts = [
        "# API",
        "Public names by module, with the first sentence of their docstrings. Made by `python docs/make_api.py`, and "
        "compared by a test.\nThe names of the first list are imported from `perception`.",
    ]
    for module in MODULES:
        tree = ast.parse((DOCS.parent / "perception" / (module.replace(".", "/") + ".py")).read_text())
        name = f"perception.{module}".removesuffix(".__init__")
        parts += [f"## {name}", first_sentence(tree)]
        if module.endswith("__init__") and (front := exported(tree)):
            parts.append(", ".join(f"`{one}`" for one in front))
        if rows := names_of(tree):
            rows = [f"| `{one}` | {sentence} |" for one, sentence in rows]
            parts.append("\n".join(["| name | what it does |", "|---|---|", *rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    (DOCS / "api.md").write_text(make(), encoding="utf-8")
