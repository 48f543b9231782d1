"""Errors that a user can act on.

Every message names the file, the field and the fix. Scripts print it as one line on stderr and exit with code 2.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType


class PerceptionError(Exception):
    """Base class of all errors whose message is meant for the user, not for a debugger."""


class DataError(PerceptionError):
    """A dataset, an image, a calibration or a submission is missing or malformed."""


class ConfigError(PerceptionError):
    """A configuration names something that does not exist or holds an invalid value."""


class CheckpointError(PerceptionError):
    """A checkpoint is missing, unreadable, or belongs to another architecture."""


class TrainingError(PerceptionError):
    """Training stopped because a loss or a gradient is not finite."""


class Interrupted(KeyboardInterrupt):
    """Work stopped because the process received SIGTERM or SIGINT; the message says how to go on.

    Args:
        message: the sentence.
        signal_number: of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class PerceptionWarning(UserWarning):
    """A result or the memory was dropped, or an input is probably wrong; the message names the cause and the fix."""


def _sentence(error: PerceptionError) -> str:
    # torch re-raises the error of a DataLoader worker with the worker's traceback as its message. The last line of the
    # traceback holds the name of the class and the sentence.
    message = str(error)
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message


# The extras of the distribution, and the packages that each brings.
EXTRAS = {
    "mmdet3d": ("mmcv", "mmdet", "mmdet3d"),
    "timm": ("timm",),
    "export": ("ml_dtypes", "onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt_rtx", "cuda"),
    "viewer": ("matplotlib",),
    "argoverse": ("pyarrow",),
    "recordings": ("rosbags", "av", "mcap", "mcap_protobuf", "foxglove_schemas_protobuf", "rerun"),
}


def not_installed(error: ImportError) -> ConfigError | None:
    """The error for a package that an extra brings and that is not installed; None for any other package."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return ConfigError(f"{package} is not installed; install it, or the extra [{extra}] of driving-perception")
    return None


def _terminate(main_process: int, number: int, frame: FrameType | None) -> None:
    if os.getpid() == main_process:
        raise Interrupted("the process was terminated; what it had not finished is not written", number)
    # Worker processes inherit this handler; they end at once, as without it.
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def run_script(main: Callable[[], int | None]) -> None:
    """Runs the main function of a script and exits.

    The exit code is the one that `main` returns (0 for None), 2 for a `PerceptionError`, also one from a worker process
    of a DataLoader, and for a package of an extra that is not installed, 130 after an interrupt and 143 after SIGTERM,
    which ends the command in order: temporary files and folders are removed. Errors are printed as one line on stderr.
    """
    before = signal.signal(signal.SIGTERM, partial(_terminate, os.getpid()))
    try:
        code = main()
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except PerceptionError as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if not (known := not_installed(error)):
            raise
        print(f"error: {known}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code or 0)
