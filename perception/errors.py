"""Errors that a user can act on.

Every message names the file, the field and the fix. Scripts print it as one line on stderr and exit with code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


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
    "export": ("ml_dtypes", "onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt_rtx", "cuda"),
    "viewer": ("matplotlib",),
}


def not_installed(error: ModuleNotFoundError) -> ConfigError | None:
    """The error for a package that an extra brings and that is not installed; None for any other package."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return ConfigError(f"{package} is not installed; install it, or the extra [{extra}] of driving-perception")
    return None


def run_script(main: Callable[[], int | None]) -> None:
    """Runs the main function of a script and exits.

    The exit code is the one that `main` returns (0 for None), 2 for a `PerceptionError`, also one from a worker process
    of a DataLoader, and for a package of an extra that is not installed, and 130 after an interrupt. Errors are printed
    as one line on stderr.
    """
    try:
        code = main()
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
    sys.exit(code or 0)
