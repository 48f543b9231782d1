"""The same as `perception demo`."""

from perception.cli import run

if __name__ == "__main__":
    run("demo")
