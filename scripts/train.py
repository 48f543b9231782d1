"""The same as `perception train`."""

from perception.cli import run

if __name__ == "__main__":
    run("train")
