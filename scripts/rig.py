"""The same as `perception rig`."""

from perception.cli import run

if __name__ == "__main__":
    run("rig")
