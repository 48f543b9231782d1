"""The same as `perception evaluate`."""

from perception.cli import run

if __name__ == "__main__":
    run("evaluate")
