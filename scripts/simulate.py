"""The same as `perception simulate`."""

from perception.cli import run

if __name__ == "__main__":
    run("simulate")
