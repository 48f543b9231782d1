"""The same as `perception doctor`."""

from perception.cli import run

if __name__ == "__main__":
    run("doctor")
