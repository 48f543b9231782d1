"""The same as `perception import-checkpoint`."""

from perception.cli import run

if __name__ == "__main__":
    run("import-checkpoint")
