"""The same as `perception predict`."""

from perception.cli import run

if __name__ == "__main__":
    run("predict")
