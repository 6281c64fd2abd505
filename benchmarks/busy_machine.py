"""What the commands cost beside busy programs, and on an idle machine, in CPU time and wall time.

    python benchmarks/busy_machine.py [--repeats 2] [--commands counterfactual isolate ...]

Each command is run in new processes, in turn: as it is, with one thread, and with OpenMP's waiting loops as they are
without our setting ("loops"). "from Python" is the counterfactual command's work in a process that has loaded torch
before this package. Printed are ratios to one thread: of CPU time beside one busy loop a core, and of wall time without
any. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

APP = ["-m", "moe_interp.cli"]
SCRIPT = """
import torch
import moe_interp as mi
from moe_interp.cli.inputs import demo_sequences
moe, items = mi.load_demo()
mi.counterfactual_routes(moe, demo_sequences(6), progress=False)
"""
COMMANDS: dict[str, list[str]] = {
    "counterfactual": [*APP, "counterfactual", "-m", "demo", "--first", "6", "-o", "{out}"],
    "isolate": [*APP, "isolate", "-m", "demo", "--first", "6", "-o", "{out}"],
    "verify": [*APP, "verify", "-m", "demo"],
    "testbed": [*APP, "testbed", "--steps", "30", "--strategies", "micro_batch", "--seeds", "0", "-o", "{out}"],
    "demo": [*APP, "demo", "--first", "8", "-o", "{out}"],
    "from Python": ["-c", SCRIPT],
}
# what a process finds in its environment
WAYS: dict[str, dict[str, str]] = {
    "as it is": {},
    "one thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "loops": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


@contextmanager
def busy_loops(n: int) -> Iterator[None]:
    """So many other programs that never rest."""
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # also ends with this process
    loops = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def seconds(command: list[str], settings: dict[str, str]) -> tuple[float, float]:
    """CPU and wall time of one run in a new folder."""
    environment = {name: value for name, value in os.environ.items() if name not in THREADS} | settings
    with tempfile.TemporaryDirectory() as out:
        given = [sys.executable, "-W", "ignore", *(part.replace("{out}", out) for part in command)]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(given, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _, said = process.communicate()
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(given)}\n{said}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure(command: list[str], repeats: int) -> dict[str, tuple[float, float]]:
    """Medians by way, the ways taken in turn."""
    runs: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, settings in WAYS.items():
            runs[way].append(seconds(command, settings))
    return {way: (median(cpu for cpu, _ in found), median(wall for _, wall in found)) for way, found in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    print(f"{cores} cores; ratios to one thread, in brackets: seconds")
    print(f"{'':16}{'beside busy loops: CPU time':>44}{'idle: wall time':>44}")
    for name in options.commands:
        with busy_loops(cores):
            busy = measure(COMMANDS[name], options.repeats)
        idle = measure(COMMANDS[name], options.repeats)
        cells = []
        for found, which in ((busy, 0), (idle, 1)):
            one = found["one thread"][which]
            for way in ("as it is", "loops"):
                cells.append(f"{way} {found[way][which] / one:.2f} ({found[way][which]:.1f})")
        print(f"{name:16}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
