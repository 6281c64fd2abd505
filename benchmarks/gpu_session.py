"""The order of what benchmarks/gpu.py measures, and what each part of it gets of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from gpu_model import build, free, implementations
from gpu_parts import PARTS, Bench
from gpu_runs import measure_exactness, measure_experiment, measure_gemm, measure_paper
from gpu_shapes import REAL_SIZES, SHAPES, TINY_SIZES
from gpu_table import NOT_MEASURED, machine, markdown, model_rows, run_rows
from gpu_timing import Limit, LimitReached

RESERVE = 0.1  # of the limit, and two seconds at most: for what runs at its end, and the table
START = 4.0  # seconds a GPU needs to begin
PREPARATION = 25.0  # seconds the testbed's data and model need before its first step, on a GPU's host
BUILDING = 1.0  # seconds a billion parameters, until one was built


def device_of(asked: str | None, *, tiny: bool) -> torch.device | None:
    """The device asked for, else a GPU where there is one, but for tiny sizes; None where there is no such GPU."""
    is_there = torch.cuda.is_available()
    if asked == "cuda" and not is_there:
        return None
    return torch.device(asked or ("cuda" if is_there and not tiny else "cpu"))


class Session:
    """All measurements on one device."""

    def __init__(self, names: Sequence[str], seconds: float, device: torch.device, *, tiny: bool) -> None:
        self.names, self.device, self.tiny = names, device, tiny
        self.limit = Limit(seconds - min(2.0, RESERVE * seconds))
        self.sizes = TINY_SIZES if tiny else REAL_SIZES
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.cells: dict[str, str] = {}  # of what is measured once
        self.columns: dict[str, dict[str, str]] = {self.title(name): {} for name in names}
        self.gemm: float | None = None
        self.building = BUILDING
        self.failed = False

    def title(self, name: str) -> str:
        return SHAPES[name].name + (", tiny" if self.tiny else "")

    def say(self, line: str) -> None:
        print(f"[{self.limit.left():6.1f} s left] {line}", flush=True)

    def run(self) -> float:
        """Measures until the limit, and gives the seconds that it took; what is not over then is in no table."""
        start = time.perf_counter()
        self.say(machine(self.device))
        try:
            with self.limit.kept():
                self.measure()
        except LimitReached:
            self.say("stopped at the limit")
        return time.perf_counter() - start

    def measure(self) -> None:
        start = 0.0 if self.tiny else START
        if self.fits("exactness", start, self.limit):
            self.attempt("exactness", ("exact_branches", "exact_hooks"), self.exactness)
        if self.fits("matrix product", start / 4, self.limit):
            self.attempt("matrix product", ("gemm",), self.product)
        for number, name in enumerate(self.names):
            # the whole experiment on one of the models counts half a model, the testbed's steps .7
            share = 1.5 if name == "olmoe" else 1.0
            others = len(self.names) - number - 1 + 0.7
            limit = self.limit.share(share / (share + others))
            self.attempt(self.title(name), (), partial(self.model, name, limit))
            free(self.device)
        if self.fits("testbed", 0.0 if self.tiny else PREPARATION, self.limit):
            self.attempt("testbed", ("paper", "paper_compiled"), self.testbed)
            free(self.device)

    def fits(self, name: str, seconds: float, limit: Limit) -> bool:
        if seconds <= limit.left():
            return True
        self.say(f"{name} skipped: about {seconds:.1f} s needed, {max(limit.left(), 0.0):.1f} s left")
        return False

    def attempt(self, name: str, rows: tuple[str, ...], call: Callable[[], None]) -> None:
        """A failure costs its rows, and the exit status."""
        try:
            call()
        except Exception as error:
            self.failed = True
            self.say(f"{name} FAILED: {type(error).__name__}: {str(error).strip()[:200]}")
            for row in rows:
                self.cells.setdefault(row, f"failed ({type(error).__name__})")
        else:
            if rows:
                self.say(f"{name}: " + "; ".join(self.cells.get(row, NOT_MEASURED) for row in rows))

    def exactness(self) -> None:
        self.failed |= not measure_exactness(self.sizes, self.device, self.cells, tiny=self.tiny)
        free(self.device)

    def product(self) -> None:
        self.gemm = measure_gemm(self.sizes, self.device, self.dtype, self.cells)
        free(self.device)

    def testbed(self) -> None:
        measure_paper(self.device, self.limit.share(0.9), self.cells, self.say, tiny=self.tiny)

    def model(self, name: str, limit: Limit) -> None:
        """One model's column."""
        shape, device, title = SHAPES[name], self.device, self.title(name)
        expected = 0.0 if self.tiny else self.building * shape.billions
        if not self.fits(f"{title}: building it", expected, limit):
            return
        start = time.perf_counter()
        bridge = build(shape, device, self.dtype, tiny=self.tiny)
        weights = sum(p.numel() * p.element_size() for p in bridge.original_model.parameters())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        if not self.tiny:
            self.building = 1.5 * (time.perf_counter() - start) / shape.billions
        built = f"{weights / 2**30:.3g} GiB built in {time.perf_counter() - start:.1f} s"
        self.say(f"{title}: {built}, {implementations(bridge)}")
        bench = Bench(title, bridge, self.sizes, limit, device, self.gemm, self.say, self.columns[title])
        try:
            for part in PARTS:
                self.failed |= not part.run(bench)
        finally:
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device)
                bench.cells["memory"] = f"{peak / 2**30:.1f} ({weights / 2**30:.1f}) GiB"
        if name == "olmoe":
            self.experiment(bench)

    def experiment(self, bench: Bench) -> None:
        needed = 2 * bench.sizes.sequence_tokens * bench.sizes.routes / (bench.branch or math.inf)
        if not bench.branch:
            self.say("whole experiment skipped: no branches were measured to plan it by")
        elif self.fits("whole experiment", 4 * needed, bench.limit):
            self.attempt("whole experiment", ("experiment",), lambda: measure_experiment(bench, self.cells))

    def tables(self) -> str:
        once = markdown(run_rows(self.sizes), {"measured": self.cells}, "once")
        models = markdown(model_rows(self.sizes), self.columns, f"T {self.sizes.pos}, R {self.sizes.routes}")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{machine(self.device)}; {dtype}, random weights\n\n{once}\n\n{models}"
