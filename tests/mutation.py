"""Do the tests notice a fault? Plants small faults in the library, one at a time, and runs the tests of that module.

    python tests/mutation.py --faults 12 --seed 0 --json out/mutation.json
    python tests/mutation.py --modules perception.geometry --faults 40

A fault is an exchanged operator, a number that is a little off, a condition that is turned round, or a call of the
neighbouring function. It is caught if a test fails, or if the tests take far longer than without it. Survivors are
printed with file and line; some of them mean the same as the original, so look at each. With --json, what was caught
stays caught as long as the module does not change, and survivors are planted again.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
MEMORY = 8 * 2**30  # bytes that the tests of a fault may take, so that an exchanged operator does not take them all
LONGER = 10  # times the processor time of the tests without a fault: they do not end
# Modules whose numbers are the product, and the tests that hold them.
MODULES = {
    "perception.geometry": "geometry",
    "perception.cameras": "cameras sampling losses",
    "perception.grid": "grid",
    "perception.types": "types",
    "perception.targets": "targets losses",
    "perception.matching": "losses lanes_eval",
    "perception.ops.sampling": "sampling bilinear",
    "perception.ops.deformable": "bilinear",
    "perception.models.decoding": "model",
    "perception.models.bev_transformer.encoder": "model shipped_weights",
    "perception.models.bev_transformer.decoder": "model shipped_weights",
    "perception.models.bev_transformer.losses": "losses",
    "perception.models.published.geometry": "bevformer maptr mapqr",
    "perception.models.mapqr.encoder": "mapqr",
    "perception.models.mapqr.decoder": "mapqr",
    "perception.models.published.losses": "published_losses",
    "perception.models.provenance": "provenance",
    "perception.data.index": "nuscenes tables table_blocks index_cache",
    "perception.data.index_files": "index_cache",
    "perception.data.sample_lines": "nuscenes table_blocks",
    "perception.data.nuscenes": "nuscenes augment",
    "perception.data.tables": "table_blocks tables",
    "perception.data.table_files": "table_blocks",
    "perception.data.findings": "table_blocks tables",
    "perception.data.table_checks": "table_blocks tables",
    "perception.data.checked_tables": "tables",
    "perception.processes": "processes",
    "perception.data.loader": "loader",
    "perception.data.lane_map": "lane_map",
    "perception.data.lane_topology": "lane_topology",
    "perception.data.map_vectors": "infos",
    "perception.data.augment": "augment",
    "perception.data.corruptions": "corruptions",
    "perception.data.infos": "infos",
    "perception.data.splits": "splits",
    "perception.data.geographic_split": "splits",
    "perception.data.leakage": "splits",
    "perception.engine.checkpoints": "work_dir",
    "perception.evaluation.lanes": "lanes_eval",
    "perception.evaluation.lane_report": "lane_report",
    "perception.evaluation.detection": "detection_eval splits",
    "perception.evaluation.dataset": "evaluation_dataset",
    "perception.evaluation.robustness": "robustness",
    "perception.evaluation.stability": "stability",
    "perception.evaluation.confidence": "confidence",
    "perception.evaluation.submission": "submission",
    "perception.inference.checks": "checks",
    "perception.inference.plausibility": "plausibility",
    "perception.inference.live": "live_step",
    "perception.inference.visibility": "visibility",
    "perception.inference.ego_motion": "ego_motion",
    "perception.inference.fitting": "loader images",
    "perception.rigs.models": "camera_models",
    "perception.rigs.lenses": "camera_models",
    "perception.rigs.rig": "rig_files",
    "perception.rigs.virtual": "virtual_cameras",
    "perception.rigs.remap": "virtual_cameras",
    "perception.rigs.coverage": "virtual_cameras",
    "perception.rigs.importers": "rig_importers bags",
    "perception.rigs.datasets": "rig_importers",
    "perception.rigs.ros": "rig_importers",
    "perception.export.images": "images",
    "perception.export.runtime": "runtime",
    "perception.export.contract": "contract",
}
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
}  # fmt: skip
NEIGHBOURS = {
    "min": "max", "max": "min", "amin": "amax", "amax": "amin", "floor": "round", "round": "floor", "ceil": "floor",
    "sin": "cos", "cos": "sin", "any": "all", "all": "any", "argmax": "argmin", "argmin": "argmax", "sum": "mean",
    "mean": "sum", "zeros": "ones", "ones": "zeros", "sort": "flip", "minimum": "maximum", "maximum": "minimum",
}  # fmt: skip


def faults_of(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    """Lists every node that can be changed, and how. Messages, annotations and assertions are left alone."""
    left_alone: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
            parts = [node]
        elif isinstance(node, ast.keyword) and node.arg in (
            "strict",
            "stacklevel",
        ):  # assertions of zip, places of warnings
            parts = [node]
        elif isinstance(node, ast.arg | ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            parts = [node.returns, *node.decorator_list]
        elif isinstance(node, ast.ClassDef):
            parts = [*node.decorator_list]
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            parts = [node]
        for part in parts:
            left_alone |= {id(inner) for inner in ast.walk(part)} if part is not None else set()
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if id(node) in left_alone:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
            found.append((node, "comparison"))
        elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
            found.append((node, "arithmetic"))
        elif isinstance(node, ast.BoolOp):
            found.append((node, "and/or"))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            found.append((node, "sign"))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            found.append((node, "constant"))
        elif isinstance(node, ast.If | ast.IfExp):
            found.append((node, "condition"))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in NEIGHBOURS:
            found.append((node, "neighbour"))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("min", "max", "round"):
            found.append((node, "neighbour"))
    return found


def planted(source: str, number: int) -> tuple[ast.Module, str]:
    """The tree of a source with fault `number`, and a line that describes it."""
    tree = ast.parse(source)
    node, kind = faults_of(tree)[number]
    before = ast.unparse(node if not isinstance(node, ast.If) else node.test)
    if isinstance(node, ast.Compare):
        node.ops[0] = COMPARE[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = ARITHMETIC[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), copy.deepcopy(node.operand))
    elif isinstance(node, ast.Constant):
        value = node.value
        node.value = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else 1.1 * value
        if value == 0.0 and isinstance(value, float):
            node.value = 0.1
    elif isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), copy.deepcopy(node.test))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node.func.attr = NEIGHBOURS[node.func.attr]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        node.func.id = {"min": "max", "max": "min", "round": "int"}[node.func.id]
    after = ast.unparse(node if not isinstance(node, ast.If) else node.test)
    ast.fix_missing_locations(tree)
    return tree, f"{kind} in line {node.lineno}: {before} -> {after}"


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a module another content than its file has."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


class Observer:
    """Runs the quick tests of each file first; notes the first that fails, and how long each took."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.took, self.noticed = seconds, {}, ""

    def pytest_collection_modifyitems(self, items) -> None:
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path), self.seconds.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report) -> None:
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.noticed = self.noticed or report.nodeid

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.noticed = self.noticed or f"the import of {report.nodeid}"


class Run(NamedTuple):
    """What tests of a module did."""

    noticed: str  # the first test that failed; empty if all passed
    cpu_seconds: float
    took: dict[str, float]  # seconds of each test


def run_tests(name: str, tests: list[str], tree: ast.Module | None, limit: float, took: dict[str, float]) -> Run:
    """Runs tests in a child process.

    Args:
        name: the module that gets the content of `tree`.
        tests: files of tests.
        tree: the module with a fault; None runs the module as it is.
        limit: seconds of processor time, and a tenth of the limit of wall time, which other processes can use up.
        took: seconds of each test, for the order.
    """
    scratch = Path(tempfile.mkdtemp(prefix="mutation-"))
    process = os.fork()
    if process == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if tree is not None:
            sys.meta_path.insert(0, Loader(name, path_of(name), tree))
        import pytest

        observer = Observer(took)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={scratch / 'tests'}"]
        code = pytest.main([*options, *tests], plugins=[observer])
        noticed = (observer.noticed or "pytest") if code else ""
        (scratch / "result.json").write_text(json.dumps([noticed, observer.took]))
        os._exit(0)
    start = time.monotonic()
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended or time.monotonic() - start > 10 * limit:
            break
        time.sleep(0.05)
    if not ended:
        os.killpg(process, signal.SIGKILL)
        _, status, usage = os.wait4(process, 0)
    if status == 0:
        noticed, took = json.loads((scratch / "result.json").read_text())
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        noticed = "the tests did not end"
    else:
        noticed = "the tests crashed"
    shutil.rmtree(scratch, ignore_errors=True)
    return Run(noticed, usage.ru_utime + usage.ru_stime, took)


def path_of(name: str) -> Path:
    return PROJECT / f"{name.replace('.', '/')}.py"


def load_packages() -> None:
    """Loads what takes long to load and is not under test; the processes of the tests inherit it."""
    import hypothesis.internal.observability
    import matplotlib.pyplot
    import nuscenes.eval.detection.evaluate
    import pytest
    import scipy.optimize
    import torch.distributed.tensor  # `torch.testing` loads it
    import torch.export

    for package in (hypothesis, matplotlib, nuscenes, pytest, scipy, torch):
        assert package
    torch.set_num_threads(1)
    gc.freeze()


def plant(name: str, chosen: dict[str, ast.Module], done: dict[str, str], save: Callable[[], None]) -> None:
    """Plants the faults of a module that are not in `done` or have survived, and notes what noticed each of them."""
    tests = [f"tests/test_{test}.py" for test in MODULES[name].split()]
    good = run_tests(name, tests, None, 3000, {})
    if good.noticed:
        print(f"{name}: fails without a fault: {good.noticed}", flush=True)
        return
    print(f"{name}: its tests take {good.cpu_seconds:.0f} s", flush=True)
    for fault, tree in chosen.items():
        if not done.get(fault):
            done[fault] = run_tests(name, tests, tree, max(60, LONGER * good.cpu_seconds), good.took).noticed
            if not done[fault]:
                print(f"survived: {path_of(name).relative_to(PROJECT)}, {fault}", flush=True)
            save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=list(MODULES), choices=list(MODULES), metavar="MODULE")
    parser.add_argument("--faults", type=int, default=10, help="planted in each module (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which faults (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results; one that exists is continued")
    parser.add_argument("--table", action="store_true", help="plant nothing; print what the file holds")
    arguments = parser.parse_args()

    os.chdir(PROJECT)
    sys.path.insert(0, str(PROJECT))
    os.environ["OMP_NUM_THREADS"] = "1"
    if not arguments.table:
        load_packages()
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}

    def save() -> None:
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1))

    rows = {}
    for name in arguments.modules:
        source = path_of(name).read_text(encoding="utf-8")
        digest = hashlib.sha256(source.encode()).hexdigest()
        if results.get(name, {}).get("source") != digest:
            results[name] = {"source": digest, "faults": {}}
        done = results[name]["faults"]
        count = len(faults_of(ast.parse(source)))
        numbers = random.Random(f"{arguments.seed} {name}").sample(range(count), min(arguments.faults, count))
        chosen = {f"{number}: {fault}": tree for number in numbers for tree, fault in [planted(source, number)]}
        if not arguments.table and not all(done.get(fault) for fault in chosen):
            plant(name, chosen, done, save)
        rows[name] = [done[fault] for fault in chosen] if done.keys() >= chosen.keys() else []
    print("\n| module | faults | caught | share |\n|---|---|---|---|")
    rows["all"] = [value for values in rows.values() for value in values]
    for name, values in rows.items():
        if values:
            caught = sum(map(bool, values))
            print(f"| {name} | {len(values)} | {caught} | {caught / len(values):.0%} |")
    if missing := [name for name, values in rows.items() if not values]:
        sys.exit(f"not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
