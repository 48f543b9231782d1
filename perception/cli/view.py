"""Opens the rerun viewer with the predictions of a recording (`perception predict --write rrd`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from perception.cli import command_parser
from perception.errors import ConfigError, DataError, not_installed

EXAMPLE = """examples:
  perception view out/drive
  perception view out/drive/recording.rrd --web
"""
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY", "WAYLAND_SOCKET")
MAGIC = b"RRF"  # at the beginning of every .rrd


def recording_file(path: Path) -> Path:
    """Returns the .rrd that a file or folder names.

    Raises:
        DataError: there is none, or it is damaged.
    """
    make = "make one with: perception predict --images ... --write rrd"
    if path.suffix == ".mcap":
        raise DataError(f"{path} is an MCAP file: open it with Foxglove or Lichtblick; perception view shows .rrd")
    if path.is_dir():
        found = sorted(path.glob("*.rrd"))
        if len(found) != 1:
            raise DataError(f"{path} holds {len(found)} .rrd files; give one of them, or {make}")
        path = found[0]
    if not path.exists():
        raise DataError(f"{path} does not exist; give a .rrd file, or {make}")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise DataError(f"{path} is no recording of rerun; give a .rrd file, or {make}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("view", __doc__, EXAMPLE)
    parser.add_argument("file", type=Path, help="a .rrd file, or a folder that perception predict wrote")
    parser.add_argument("--web", action="store_true", help="serve the viewer to a browser, where there is no display")
    arguments = parser.parse_args(argv)

    path = recording_file(arguments.file)
    try:
        import rerun  # noqa: F401
    except ImportError as error:
        raise not_installed(error) or error from None
    has_display = sys.platform != "linux" or any(os.environ.get(name) for name in DISPLAYS)
    if not has_display and not arguments.web:
        raise ConfigError(f"there is no display to show {path} on; add --web, and open the address that it prints")
    # The default address of its servers is that of all networks.
    web = ["--web-viewer", "--bind", "127.0.0.1"] if arguments.web else []
    sys.stdout.flush()
    # This process becomes the viewer: signals that end it reach the viewer, which would else be left behind.
    os.execv(sys.executable, [sys.executable, "-m", "rerun", *web, str(path)])
