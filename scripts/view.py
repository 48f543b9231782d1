"""The same as `perception view`."""

from perception.cli import run

if __name__ == "__main__":
    run("view")
