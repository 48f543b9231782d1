"""`python -m perception COMMAND`, the same as `perception COMMAND`."""

from perception.cli import run

if __name__ == "__main__":
    run()
