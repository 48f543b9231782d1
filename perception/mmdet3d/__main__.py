"""`python -m perception.mmdet3d train|test|create_data ...`: mmdet3d's own tools, which find our networks by name."""

import sys

from perception.errors import ConfigError, run_script


def main() -> None:
    """Runs the tool that the first argument names with the other arguments."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ConfigError("name a tool of mmdet3d: python -m perception.mmdet3d train|test|create_data, then its own")
    from perception.mmdet3d.tools import run_tool

    run_tool(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    run_script(main)
