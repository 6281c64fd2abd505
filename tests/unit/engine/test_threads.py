"""OpenMP's threads sleep while a pass waits: measured as CPU time, and which functions see to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_interp as mi
from moe_interp.engine.cpu import threads
from moe_interp.engine.cpu.threads import WAITING, let_threads_sleep, threads_asleep
from moe_interp.routes import score_joint_routes
from moe_interp.verification import verify

MEASURE = """
import time, torch
from moe_interp.engine.cpu.threads import threads_asleep
values = torch.rand(400_000)  # enough for two threads
def cpu_seconds():
    start = time.process_time()
    for _ in range(60):
        values.exp()
        time.sleep(0.005)
    return time.process_time() - start
def round_of_three():
    before = cpu_seconds()
    with threads_asleep():
        within = cpu_seconds()
    return before, within, cpu_seconds()
# the least of several rounds: what other programs and the start cost is not in all of them
print(*map(min, *[round_of_three() for _ in range(3)]))
"""
IN_TASKS = Path("/proc/self/task")


def measured(**environment: str) -> list[float]:
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    given = clean | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"} | environment
    done = subprocess.run([sys.executable, "-c", MEASURE], env=given, capture_output=True, text=True, check=True)
    return [float(part) for part in done.stdout.split()]


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    number = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(number)


@pytest.mark.skipif(not IN_TASKS.is_dir(), reason="other systems have other OpenMP libraries")
def test_threads_that_wait_take_no_cpu_time_within_and_what_they_took_before_after() -> None:
    before, within, after = measured()
    assert within < 0.5 * min(before, after)
    assert within < 0.1  # of 0.3 s in which there was nothing to do


def test_what_the_command_line_sets_does_the_same_from_the_start() -> None:
    let_threads_sleep(environment := {})
    assert max(measured(**environment)) < 0.1


def test_the_users_word_stands(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    empty: dict[str, str] = {}
    let_threads_sleep(empty)
    assert empty == {"OMP_WAIT_POLICY": "PASSIVE"}
    for name in WAITING:
        given = {name: "as they like"}
        let_threads_sleep(given)
        assert given == {name: "as they like"}
        monkeypatch.setenv(name, "as they like")
        before = n_tasks()
        with threads_asleep():
            assert n_tasks() == before
        monkeypatch.delenv(name)


def n_tasks() -> int:
    return len(list(IN_TASKS.iterdir())) if IN_TASKS.is_dir() else 0


@pytest.mark.skipif(not IN_TASKS.is_dir(), reason="threads are counted as Linux lists them")
def test_blocks_share_the_idle_threads_and_the_last_one_ends_them(two_threads: None) -> None:
    torch.rand(400_000).exp()  # the pass has its own by now
    before = n_tasks()
    with threads_asleep():
        within = n_tasks()
        assert within > before
        with pytest.raises(AssertionError), threads_asleep():
            assert n_tasks() > within, "they are shared"
        assert n_tasks() == within
    for _ in range(200):
        if n_tasks() == before:
            break
        torch.rand(100).exp()
        os.sched_yield()
        threads.Event().wait(0.01)
    assert n_tasks() == before
    torch.set_num_threads(1)
    with threads_asleep():
        assert n_tasks() == before


PASSES: list[Callable[..., Any]] = [
    mi.isolate_experts,
    mi.counterfactual_routes,
    mi.score_domain_router,
    mi.score_routes,
    mi.screen_routes,
    score_joint_routes,
    verify.verify,
    mi.testbed.train,
]


@pytest.mark.parametrize("run", PASSES, ids=lambda run: run.__name__)
def test_whatever_runs_a_model_lets_threads_sleep(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    seen = []
    monkeypatch.setattr(threads._IdleThreads, "enter", lambda self, library: seen.append("enter"))
    monkeypatch.setattr(threads._IdleThreads, "leave", lambda self: seen.append("leave"))
    with suppress(Exception):  # whatever it says to arguments without sense
        run(*[None] * 4)
    assert seen == ["enter", "leave"]
