"""The same as `perception benchmark`."""

from perception.cli import run

if __name__ == "__main__":
    run("benchmark")
