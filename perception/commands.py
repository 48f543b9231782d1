"""The commands of the library, and how the user of this process calls them.

Help and messages name commands. A user who installed a wheel has `perception train`, a user of a checkout may prefer
`python scripts/train.py`. Texts are written in the first form; `as_called` turns them into the form in use.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

COMMANDS = {
    "demo": "generate a small town, predict it with the shipped weights, draw and score the result",
    "predict": "predict a recording or one sample, draw it, and write its boxes and lines",
    "view": "open the predictions of a recording in the rerun viewer",
    "train": "train a network from a config",
    "evaluate": "evaluate weights, or a submission, on a nuScenes-format split",
    "export": "export a network for the vehicle and certify the export",
    "rig": "check, import or show the calibration of cameras",
    "simulate": "generate a dataset of the synthetic town in nuScenes format",
    "benchmark": "compare trainings and runtimes, and measure a GPU",
    "doctor": "check the installation, or a dataset",
    "import-checkpoint": "import a checkpoint of the published code",
    "prepare-nuscenes": "measure the leakage of a split, and make splits that do not leak",
}
_IN_TEXT = re.compile(
    rf"(?<!-m )\bperception ({'|'.join(COMMANDS)})\b"
)  # not after `-m`, which calls the package itself


def command(name: str) -> str:
    """How a command of `COMMANDS` is called, such as `perception train` or `python scripts/train.py`.

    It follows the way in which this process was started.
    """
    program = Path(sys.argv[0])
    if (program.parent.name, program.name) == ("perception", "__main__.py"):
        return f"python -m perception {name}"
    if program.suffix == ".py" and program.stem.replace("_", "-") in COMMANDS:
        script = program.with_name(f"{name.replace('-', '_')}.py")
        if script.is_absolute() and script.is_relative_to(Path.cwd()):
            script = script.relative_to(Path.cwd())
        return f"python {shlex.quote(str(script))}"
    return f"perception {name}"


def as_called(text: str) -> str:
    """A text with every `perception COMMAND` in it as `command` spells it."""
    return _IN_TEXT.sub(lambda match: command(match[1]), text)
