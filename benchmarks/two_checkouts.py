"""Whether a change made branches or isolation slower: two checkouts take turns in one run.

    git worktree add ../before COMMIT
    python benchmarks/two_checkouts.py ../before [--rounds 6] [--length 64] [--items 8]

Each checkout has a process of its own, which builds the models of its own ``benchmarks/counterfactual.py`` and
``benchmarks/isolation.py``. Only one process works at a time. In every round each times both jobs once, in random
order, and the table gives the median and the quartiles over rounds of this checkout's time over the other's. Times are
processor time on one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def jobs(length: int, n_items: int) -> dict[str, Callable[[], object]]:
    """What is timed: branches at every layer, and forced experts at two layers."""
    import counterfactual
    import isolation
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    ways = counterfactual.Ways(*counterfactual.build(), length, 32)
    moe = isolation.build()
    tokens = torch.randint(3, isolation.VOCAB, (n_items, isolation.TOKENS))
    middle = isolation.LAYERS // 2
    cells = [(layer, expert) for layer in (middle - 1, middle) for expert in range(8)]

    @torch.no_grad()
    def isolate() -> None:
        isolation.engine(moe, tokens, cells, None)

    return {"branches": ways.branches, "isolation": isolate}


def work(length: int, n_items: int) -> None:
    """A checkout's process: answers each job named on its input with the seconds that it took."""
    calls = jobs(length, n_items)
    for call in calls.values():
        call()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.process_time()
        calls[line.strip()]()
        print(time.process_time() - start, flush=True)


def started(checkout: Path, length: int, n_items: int) -> subprocess.Popen[str]:
    """The process of a checkout, which imports that checkout's package and benchmarks."""
    folders = os.pathsep.join([str(checkout), str(checkout / "benchmarks")])
    command = [sys.executable, __file__, "--work", "--length", str(length), "--items", str(n_items)]
    environment = os.environ | {"PYTHONPATH": folders, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout, env=environment
    )
    answer_of(process)
    return process


def answer_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    answer = process.stdout.readline().strip()
    if not answer:
        raise SystemExit(f"The process of {process.args!r} ended before it answered; its own message is above.")
    return answer


def seconds(process: subprocess.Popen[str], job: str) -> float:
    assert process.stdin is not None
    process.stdin.write(job + "\n")
    process.stdin.flush()
    return float(answer_of(process))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="the checkout to compare this one with")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--length", type=int, default=64, help="tokens of the sequence that branches are scored on")
    parser.add_argument("--items", type=int, default=8, help="items of isolation")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.length, options.items)
        return
    if options.other is None:
        parser.error("Name the other checkout: python benchmarks/two_checkouts.py ../before")
    checkouts = [HERE, options.other.resolve()]
    processes = [started(checkout, options.length, options.items) for checkout in checkouts]
    ratios: dict[str, list[float]] = {"branches": [], "isolation": []}
    for _ in range(options.rounds):
        for job, found in ratios.items():
            taken = {}
            for which in random.sample(range(2), 2):
                taken[which] = seconds(processes[which], job)
            found.append(taken[0] / taken[1])
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    print(f"time of {HERE.name} over that of {options.other.resolve().name}, {options.rounds} rounds:")
    for job, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
        print(f"  {job:10s} {middle:.3f}  (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
