"""The command line: the same commands from a wheel and from a checkout, quick where nothing has to be computed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from perception import __version__
from perception.cli import main
from perception.commands import COMMANDS, as_called, command
from perception.errors import ConfigError
from perception.evaluation.submission import write_lanes

# Runs a command in a fresh process and prints which packages it has loaded by its end.
WATCHED = """
import json, sys
from perception.cli import main
from perception.errors import PerceptionError
try:
    main(sys.argv[1:])
except (SystemExit, PerceptionError) as stop:
    print(stop, file=sys.stderr)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
SLOW_TO_LOAD = {
    "torch", "torchvision", "nuscenes", "mmdet3d", "mmdet", "mmcv", "cv2", "matplotlib", "embreex", "onnx",
    "onnxruntime", "scipy",
}  # fmt: skip


def watched(*arguments, cwd: Path = PROJECT) -> tuple[set[str], str, str]:
    """The packages that a command loads, what it printed, and the error it stopped with."""
    command_line = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    run = subprocess.run(command_line, capture_output=True, text=True, cwd=cwd, check=True)
    printed, _, loaded = run.stdout.rstrip("\n").rpartition("\n")
    return set(json.loads(loaded)), printed, run.stderr


def called(*command_line, cwd: Path = PROJECT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command_line)], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_nothing_heavy(name):
    loaded, printed, _ = watched(name, "--help")
    assert printed.startswith(f"usage: perception {name} ") and f"\n  perception {name}" in printed
    assert not loaded & SLOW_TO_LOAD


def test_every_module_and_script_is_a_command():
    modules = {path.stem.replace("_", "-") for path in (PROJECT / "perception" / "cli").glob("*.py")} - {"--init--"}
    scripts = {path.stem.replace("_", "-") for path in (PROJECT / "scripts").glob("*.py")}
    assert set(COMMANDS) == modules == scripts


def test_help_shows_the_command_that_was_called(tmp_path):
    as_module = called("-m", "perception", "import-checkpoint", "--help")
    assert as_module.stdout.startswith("usage: python -m perception import-checkpoint ")
    assert "\n  python -m perception import-checkpoint bevformer" in as_module.stdout
    script = called("scripts/import_checkpoint.py", "--help")
    assert script.stdout.startswith("usage: python scripts/import_checkpoint.py ")
    assert "\n  python scripts/import_checkpoint.py bevformer" in script.stdout
    elsewhere = PROJECT / "scripts" / "simulate.py"
    assert called(elsewhere, "--help", cwd=tmp_path).stdout.startswith(f"usage: python {elsewhere} ")
    assert as_module.returncode == script.returncode == 0


def test_texts_name_the_command_in_use(monkeypatch):
    text = (
        "perception simulate --out a && perception prepare-nuscenes split; torchrun -m perception train; perception is"
    )
    monkeypatch.setattr("sys.argv", ["/usr/bin/perception", "train"])
    assert as_called(text) == text and command("export") == "perception export"
    monkeypatch.setattr("sys.argv", ["my scripts/train.py"])
    assert as_called(text) == (
        "python 'my scripts/simulate.py' --out a && python 'my scripts/prepare_nuscenes.py' split; "
        "torchrun -m perception train; perception is"
    )
    monkeypatch.setattr("sys.argv", ["/somewhere/train_something.py"])
    assert command("train") == "perception train"


def test_what_is_no_command():
    none = called("-m", "perception")
    assert none.returncode == 2 and all(f"\n  {name} " in none.stdout for name in COMMANDS)
    wrong = called("-m", "perception", "trian", "x")
    assert wrong.returncode == 2 and wrong.stderr.endswith("there is no command 'trian'; did you mean train?\n")
    version = called("-m", "perception", "--version")
    assert version.returncode == 0 and version.stdout == f"driving-perception {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "synthetic/nano", "--work-dir", "w", "--cfg-options", "train_data.dataroot=ROOT"),
        ("train", "synthetic/nano", "--work-dir", "w", "--cfg-options", "train_data.dataroot=['ROOT']"),
        ("evaluate", "synthetic/nano", "nano.safetensors", "--dataroot", "ROOT"),
        ("predict", "--dataroot", "ROOT", "--version", "v1.0-synthetic", "--split", "s", "--out", "a.png"),
        ("export", "nano", "--out", "x", "--dataroot", "ROOT", "--version", "v1.0-synthetic", "--split", "s"),
        ("prepare-nuscenes", "split", "--min-distance", "60", "--seed", "0", "--out", "x",
         "--dataroot", "ROOT", "--version", "v1.0-synthetic"),
    ],
)  # fmt: skip
def test_a_missing_dataset_is_named_before_anything_heavy_is_loaded(tmp_path, arguments):
    root = tmp_path / "none"
    arguments = [argument.replace("ROOT", str(root)) for argument in arguments]
    loaded, _, error = watched(*arguments, cwd=tmp_path)
    assert f"dataset {root / 'v1.0-synthetic'} does not exist; " in error
    assert not loaded & SLOW_TO_LOAD
    assert not list(tmp_path.iterdir())


def test_a_missing_dataset_of_a_submission(tmp_path):
    write_lanes(tmp_path / "lanes.json", {"token": []})
    arguments = ("--submission", "lanes.json", "--dataroot", "none", "--version", "v", "--split", "s")
    loaded, _, error = watched("evaluate", *arguments, cwd=tmp_path)
    assert "dataset none/v does not exist" in error
    assert not loaded & SLOW_TO_LOAD


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("demo", "--scenes", "1e9"), "argument --scenes: '1e9' is not a whole number from 1 to 1000"),
        (("demo", "--min-score", "7"), "argument --min-score: 7 is out of range; give a number from 0 to 1"),
        (("predict", "--info", "i", "--out", "o.png", "--min-seen", "7"), "argument --min-seen: 7 is out of range"),
        (("demo", "--min-score", "nan"), "argument --min-score: nan is out of range"),
        (("demo", "--out", "/proc/x"), "--out /proc/x cannot be written"),
        (("export", "nano", "--out", "x", "--cameras", "0"), "argument --cameras: 0 is out of range"),
        (("export", "nano", "--out", "file"), "--out file is a file; give a folder"),
        (("evaluate", "synthetic/nano", "nano", "--workers", "-1"), "argument --workers: -1 is out of range"),
        (("evaluate", "synthetic/nano", "nano", "--json", "."), "--json . is a folder; give a file"),
        (("evaluate", "synthetic/nano", "nano", "--save-submission", "file"), "is a file; give a folder"),
        (("train", "synthetic/nano", "--work-dir", "file"), "--work-dir file is a file; give a folder"),
        (("train", "synthetic/nano", "--work-dir", "x", "--seed", "-1"), "argument --seed: -1 is out of range"),
        (("train", "synthetic/nano", "--work-dir", "x", "--allow-change"), "add --resume"),
        (("import-checkpoint", "a.pth", "--out", "file/b.safetensors"), "cannot be written"),
        (("benchmark", "latency", "--models", "nano", "--passes", "0"), "argument --passes: 0 is out of range"),
        (("prepare-nuscenes", "split", "--dataroot", "d", "--version", "v", "--min-distance", "inf"), "inf is out of"),
    ],
)
def test_requests_that_make_no_sense_are_refused_before_any_work(tmp_path, monkeypatch, capsys, arguments, sentence):
    (tmp_path / "file").write_text("here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ConfigError)) as stop:
        main(arguments)
    assert sentence in f"{stop.value} {capsys.readouterr().err}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_evaluating_loads_no_renderer():
    code = """
import sys
import perception.engine.config, perception.engine.weights, perception.evaluation.dataset, perception.inference.sequence
print([name for name in sys.modules if name.partition(".")[0] in ("embreex", "trimesh", "mmcv", "mmdet", "mmdet3d")
       or name.startswith(("perception.synthetic", "mmengine.runner"))])
"""
    assert called("-c", code).stdout == "[]\n"
