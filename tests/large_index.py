"""Measures how long the index of large tables takes to build, and the memory of all its processes together.

perception simulate --out out/routes --scenes 4 --seed 7 --keyframes 40 --split town_try --image-size 32x56
python tests/large_tables.py out/routes out/large
taskset -c 0,1 python tests/large_index.py out/large out/cache
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from perception.synthetic import VERSION

CODE = """
import sys
from pathlib import Path
from perception.data.index import load_index
from perception.types import DEFAULT_LANE_RANGE
cameras = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
load_index(Path(sys.argv[1]), sys.argv[2], "large", cameras, DEFAULT_LANE_RANGE, Path(sys.argv[3]))
"""


def memory(process: int) -> int:
    """Bytes of a process and of those that it started; what they share counts once (Linux' PSS)."""
    total, waiting = 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            waiting += map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split())
            rollup = Path(f"/proc/{number}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def main(root: Path, cache: Path) -> None:
    """Prints seconds, CPU seconds of all processes, and the largest memory."""
    start, peak = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, "-c", CODE, str(root), VERSION, str(cache)])
    while child.poll() is None:
        peak = max(peak, memory(child.pid))
        time.sleep(0.2)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, cpu = time.perf_counter() - start, used.ru_utime + used.ru_stime
    print(f"{seconds:.1f} s, {cpu:.1f} CPU s, {peak / 1e9:.2f} GB, load {os.getloadavg()[0]:.1f}")
    sys.exit(child.returncode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="tables with the split `large`")
    parser.add_argument("cache", type=Path, help="an empty folder for the index")
    arguments = parser.parse_args()
    main(arguments.root, arguments.cache)
