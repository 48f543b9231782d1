"""The same as `perception prepare-nuscenes`."""

from perception.cli import run

if __name__ == "__main__":
    run("prepare-nuscenes")
