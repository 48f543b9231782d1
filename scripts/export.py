"""The same as `perception export`."""

from perception.cli import run

if __name__ == "__main__":
    run("export")
