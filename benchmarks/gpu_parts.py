"""What benchmarks/gpu.py measures on one model: each part fills its rows, as far as its time goes."""

from __future__ import annotations

import math
import random
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_model import BranchArithmetic, free
from gpu_shapes import Sizes
from gpu_timing import Limit, repeated, seconds_of
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformer_lens.model_bridge import TransformerBridge

import moe_interp as mi
from moe_interp.engine import policy
from moe_interp.engine.cuda import compiled
from moe_interp.engine.memory import tokens_per_pass
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.experiments.inputs.items import ItemBatch, check_items, tokenize_items
from moe_interp.experiments.isolation.scoring import PrefixScorer
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.routes import check_routes, score_from_base

ROUTER_HOOKS = re.compile(r"blocks\.\d+\.hook_(router_in|router_logits|router_probs|expert_indices|expert_weights)$")
EXPERT_OUT = re.compile(r"blocks\.\d+\.hook_expert_out$")
FIRST_PASS = 3.0  # seconds on a GPU, which loads its kernels
PROFILER = 6.0  # seconds that the first profile takes to begin
LAYER_COMPILING = 30.0  # seconds on a GPU: a layer, and what reads logits
PILOT = 16  # a first try has this part of the positions
WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize")


@dataclass
class Bench:
    """One model, and what has been measured of it.

    Attributes:
        name: Of the model.
        bridge: The model, without this package's hooks.
        sizes, limit, device: How much is measured, within what time, and where.
        gemm: Operations a second of a large matrix product; None if it was not measured.
        say: Prints a line.
        cells: Row -> what the table says.
        forward, naive, branch: Seconds of the plain forward pass; routes a second of the naive way and of branches at
            the middle layer at the default budget; 0 until measured. Later parts are planned by them.
    """

    name: str
    bridge: TransformerBridge
    sizes: Sizes
    limit: Limit
    device: torch.device
    gemm: float | None
    say: Callable[[str], None]
    cells: dict[str, str] = field(default_factory=dict)
    forward: float = 0.0
    naive: float = 0.0
    branch: float = 0.0

    def tokens(self, rows: int, pos: int, seed: int = 0) -> Tensor:
        vocabulary = int(self.bridge.cfg.d_vocab)
        drawn = torch.randint(3, vocabulary, (rows, pos), generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device)

    def passes(self, tokens: int) -> float:
        """About how many times the measured forward pass one of so many tokens takes."""
        return max(1.0, tokens / (self.sizes.batch * self.sizes.pos))

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Part:
    """A part: what it is called, the rows that it fills, the seconds that it needs at least, and how it is done."""

    name: str
    rows: tuple[str, ...]
    expected: Callable[[Bench], float]
    measure: Callable[[Bench], None]

    def run(self, bench: Bench) -> bool:
        """Measure if the time left holds it; whether nothing failed."""
        if not bench.forward and "forward" not in self.rows:
            bench.say(f"{bench.name}: {self.name} skipped, as no plain pass was measured to plan it by")
            return True
        expected, left = self.expected(bench), bench.limit.left()
        if expected > left:
            bench.say(f"{bench.name}: {self.name} skipped: about {expected:.1f} s needed, {max(left, 0.0):.1f} s left")
            return True
        try:
            self.measure(bench)
        except Exception as error:  # the other rows are worth having
            said = f"{type(error).__name__}: {str(error).strip()[:200]}"
            bench.say(f"{bench.name}: {self.name} FAILED: {said}")
            for row in self.rows:
                bench.cells.setdefault(row, f"failed ({type(error).__name__})")
            free(bench.device)
            return False
        bench.say(f"{bench.name}: {self.name} done, {bench.limit.left():.1f} s left of the model's")
        return True


# -- forward passes and hooks --------------------------------------------------------------------------------------


@torch.no_grad()
def measure_forward(bench: Bench) -> None:
    tokens = bench.tokens(bench.sizes.batch, bench.sizes.pos)
    times = repeated(lambda: bench.bridge(tokens), bench.device, 0.1 * bench.limit.left(), at_most=bench.sizes.rounds)
    bench.forward = statistics.median(times)
    bench.cells["forward"] = f"{1e3 * bench.forward:.1f} ms"


def read(activation: Tensor, hook: Any) -> None:
    """A hook that only looks."""


def readers(bridge: TransformerBridge, pattern: re.Pattern[str]) -> list[tuple[str, Any]]:
    return [(name, read) for name in bridge.hook_dict if pattern.match(name)]


@torch.no_grad()
def measure_hooks(bench: Bench) -> None:
    """Every round times every way once, the plain pass first or last; ratios to the same round's plain pass."""
    bridge, tokens = bench.bridge, bench.tokens(bench.sizes.batch, bench.sizes.pos)
    ways: dict[str, Callable[[MoEHooks], Any]] = {
        "unhooked": lambda moe: bridge(tokens),
        "read": lambda moe: bridge.run_with_hooks(tokens, fwd_hooks=readers(bridge, ROUTER_HOOKS)),
        "cached": lambda moe: bridge.run_with_cache(tokens, names_filter=moe.hook_name("expert_out", _middle(moe))),
        "every": lambda moe: bridge.run_with_hooks(tokens, fwd_hooks=readers(bridge, EXPERT_OUT)),
    }
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    allowance, longest = bench.limit.share(0.3), 0.0
    for turn in range(bench.sizes.rounds + 1):
        if turn > 1 and allowance.left() < longest:
            break
        before = allowance.left()
        plain = seconds_of(lambda: bridge(tokens), bench.device) if turn % 2 else None
        times = {}
        with attach(bridge) as moe:
            for name in random.Random(turn).sample(list(ways), len(ways)):
                times[name] = seconds_of(lambda name=name: ways[name](moe), bench.device)
        if plain is None:
            plain = seconds_of(lambda: bridge(tokens), bench.device)
        longest = max(longest, before - allowance.left()) if turn else 0.0
        if turn:  # after a warm-up
            for name, seconds in times.items():
                ratios[name].append(seconds / plain)
                bench.cells[name] = f"{statistics.median(ratios[name]):.2f}x"


@torch.no_grad()
def measure_waits(bench: Bench) -> None:
    """How often the host waits for the device, in a plain and in a reading pass; the largest items of the latter."""
    bridge, tokens = bench.bridge, bench.tokens(bench.sizes.batch, bench.sizes.pos)
    found = []
    with attach(bridge):
        hooks = readers(bridge, ROUTER_HOOKS)
        for fwd_hooks in ([], hooks):
            events = profiled(lambda fwd_hooks=fwd_hooks: bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks), bench)
            counts = {event.key: event.count for event in events}
            found.append(" + ".join(str(counts.get(key, 0)) for key in WAITS[: 1 + bench.on_gpu]))
    bench.cells["waits"] = f"{found[0]} and {found[1]}"
    keys = " + ".join(WAITS[: 1 + bench.on_gpu])
    bench.say(f"{bench.name}: host waits counted: {keys}")
    say_largest(bench, "a reading pass", events)


def profiled(call: Callable[[], Any], bench: Bench) -> Sequence[Any]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        seconds_of(call, bench.device)
    return profiler.key_averages()


def say_largest(bench: Bench, what: str, events: Sequence[Any], n: int = 8) -> None:
    """The operators that take the most time of the device (of the processor, without a GPU) themselves."""
    attribute = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    # a kernel's time stands beside the kernel and again beside the operator that launched it
    counted = DeviceType.CUDA if bench.on_gpu else DeviceType.CPU
    total = sum(getattr(event, attribute) for event in events if event.device_type == counted) or 1.0
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    timed = sorted(((getattr(event, attribute), event) for event in operators), key=lambda each: -each[0])
    bench.say(f"{bench.name}: largest items of {what} ({total / 1e3:.1f} ms in all):")
    for time, event in timed[:n]:
        bench.say(f"    {time / 1e3:9.2f} ms {time / total:5.0%} {event.count:7d} calls  {event.key[:80]}")


# -- routes --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_naive(bench: Bench) -> None:
    """``run_with_hooks`` on a batch of copies, each with its own route of one token."""
    sizes, best = bench.sizes, {}
    with attach(bench.bridge) as moe:
        layer, pos = _middle(moe), sizes.pos // 2
        spec = moe.spec(layer)
        for copies in sizes.copies:
            tokens = bench.tokens(1, sizes.pos).expand(copies, -1)
            routes = random_routes((copies,), spec.n_experts, spec.top_k, bench.device)

            def put(value: Tensor, hook: Any, routes: Tensor = routes) -> Tensor:
                value[:, pos] = routes
                return value

            def run(tokens: Tensor = tokens, put: Any = put) -> None:
                hooks = [(moe.hook_name("expert_indices", layer), put)]
                logits = bench.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
                logits[:, pos].float().log_softmax(-1)[:, tokens[0, pos + 1]]

            if best and bench.limit.left() < 3 * bench.forward * bench.passes(copies * sizes.pos):
                break
            try:
                times = repeated(run, bench.device, 0.1 * bench.limit.left(), at_most=3)
            except torch.OutOfMemoryError:
                if not best:
                    raise
                bench.say(f"{bench.name}: {copies} copies do not fit into memory")
                break
            best[copies] = copies / statistics.median(times)
            bench.naive = max(best.values())
            bench.cells["naive"] = f"{bench.naive:,.0f}"


def random_routes(shape: tuple[int, ...], n_experts: int, top_k: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.rand(*shape, n_experts, generator=generator, device=device).topk(top_k, dim=-1).indices


@torch.no_grad()
def measure_branches(bench: Bench) -> None:
    """Random routes of one sequence, a layer at a time, on a plain pass that is recorded once and not timed."""
    with attach(bench.bridge) as moe:
        branches = Branches(bench, moe)
        large = bench.sizes.budget
        if bench.on_gpu:
            large = min(large, torch.cuda.mem_get_info(bench.device)[0] // 2)
        middle = _middle(moe)
        runs = {
            "last": (moe.layers[-1], large),
            "middle": (middle, large),
            "default": (middle, None),
            "early": (moe.layers[len(moe.layers) // 8], large),
        }
        bench.say(f"{bench.name}: routes at layers {[layer for layer, _ in runs.values()]}, {large / 2**30:.2f} GiB")
        shares: dict[str, str] = {}
        for number, (row, (layer, budget)) in enumerate(runs.items()):
            if not branches.measure(row, layer, budget, 0.8 * bench.limit.left() / (len(runs) - number), shares):
                break
        pilot = bench.sizes.pos * bench.sizes.routes / PILOT / (branches.rate or 1.0)
        if branches.rate and bench.limit.left() > 6 * pilot + PROFILER * bench.on_gpu:
            call = branches.call(middle, None, PILOT)[0]
            say_largest(bench, f"branches at layer {middle}", profiled(call, bench))


class Branches:
    """Branches of one sequence at any of a few layers."""

    def __init__(self, bench: Bench, moe: MoEHooks) -> None:
        self.bench, self.moe, self.arithmetic = bench, moe, BranchArithmetic(moe)
        layers = sorted({moe.layers[-1], _middle(moe), moe.layers[len(moe.layers) // 8]})
        self.base = record_pass(moe, bench.tokens(1, bench.sizes.pos), layers)
        self.rate = 0.0  # routes a second of the last run

    def call(
        self, layer: int, budget: int | None, stride: int, compile: bool = False
    ) -> tuple[Callable[[], Any], list[int], Tensor]:
        """What scores the routes of every ``stride``-th position, those positions, and all routes."""
        sizes, spec = self.bench.sizes, self.moe.spec(layer)
        routes = random_routes((1, sizes.pos, sizes.routes), spec.n_experts, spec.top_k, self.bench.device)
        given, positions = {layer: check_routes(self.base, layer, routes)}, list(range(0, sizes.pos - 1, stride))

        def run() -> None:
            score_from_base(self.base, given, positions, method="branch", memory_budget=budget, compile=compile)

        return run, positions, routes[0]

    def measure(self, row: str, layer: int, budget: int | None, seconds: float, shares: dict[str, str]) -> bool:
        """All positions if some seconds hold them, else as many as they hold; False if they hold nothing."""
        bench, limit = self.bench, Limit(seconds)
        guess = self.rate / 4 or 50 * (bench.naive or bench.sizes.batch / bench.forward)
        pilot, positions, _ = self.call(layer, budget, PILOT)
        if len(positions) * bench.sizes.routes / guess > limit.left():
            bench.say(f"{bench.name}: branches ({row}) skipped, {bench.limit.left():.1f} s left")
            return False
        each = min(repeated(pilot, bench.device, seconds / 4, at_most=1)) / len(positions)
        fitting = limit.left() / (each * bench.sizes.pos)  # times that all positions fit
        stride = 1 if fitting > 1 else min(PILOT, int(1 / max(fitting, 1e-9)) + 1)
        run, positions, routes = self.call(layer, budget, stride)
        counted = [each * len(positions)]
        times = counted if stride == PILOT else repeated(run, bench.device, limit.left(), at_most=3)
        best = statistics.median(times)
        self.rate = rate = len(positions) * bench.sizes.routes / best
        bench.cells[row] = f"{rate:,.0f}" + (f" ({rate / bench.naive:,.0f}x)" if bench.naive else "")
        bench.cells[row] += "" if stride == 1 else f", of 1/{stride} of the positions"
        if row == "default":
            bench.branch = rate
        if bench.gemm:
            shares[row] = f"{self.arithmetic.of(layer, positions, routes) / best / bench.gemm:.3f}"
            known = [shares.get(name, "-") for name in ("last", "middle", "early")]
            bench.cells["shares"] = " / ".join(known)
            bench.cells |= {"share_default": shares["default"]} if row == "default" else {}
        return True


@torch.no_grad()
def measure_layouts(bench: Bench) -> None:
    """All routes of a middle layer in compact rows, as a grid, and as a compiled grid, whatever the policy takes."""
    chosen, backend = policy.GRID_SHARES.get(bench.device.type), compiled.BACKEND
    if not bench.on_gpu:
        compiled.BACKEND = "eager"  # the processor's compiler is not what is measured
    try:
        with attach(bench.bridge) as moe:
            branches = Branches(bench, moe)
            for row, share, compile in (("compact", 2.0, False), ("grid", 0.0, False), ("grid_compiled", 0.0, True)):
                policy.GRID_SHARES[bench.device.type] = policy.GridShares(share, share)
                _measure_layout(bench, branches, row, compile)
    finally:
        compiled.BACKEND = backend
        policy.GRID_SHARES.pop(bench.device.type)
        if chosen is not None:
            policy.GRID_SHARES[bench.device.type] = chosen


def _measure_layout(bench: Bench, branches: Branches, row: str, compile: bool) -> None:
    sizes = bench.sizes
    n_routes, compiling = (sizes.pos - 1) * sizes.routes, LAYER_COMPILING * bench.on_gpu * compile
    expected = n_routes / (bench.branch or 50 * bench.naive or math.inf) + compiling
    if expected > bench.limit.left():
        bench.say(f"{bench.name}: branches ({row}) skipped: about {expected:.1f} s needed")
        return
    run, *_ = branches.call(_middle(branches.moe), None, 1, compile)
    with warnings.catch_warnings():
        warnings.simplefilter("error", compiled.NotCompiledWarning)
        first = seconds_of(run, bench.device)
    rate = n_routes / statistics.median(repeated(run, bench.device, 0.3 * bench.limit.left(), at_most=3))
    bench.cells[row] = f"{rate:,.0f}" + (f", {first:.0f} s for the first time" if compile else "")


# -- isolation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_isolation(bench: Bench) -> None:
    """Every expert of one layer alone, as many as the time holds; and one forced expert by ``run_with_hooks``."""
    sizes = bench.sizes
    tokens = bench.tokens(sizes.items, sizes.item_tokens, seed=1)
    with attach(bench.bridge) as moe:
        layer = _middle(moe)
        hooks = mi.force_experts(moe, layer, 1)
        naive: Callable[[], Any] = lambda: bench.bridge.run_with_hooks(tokens, fwd_hooks=hooks)  # noqa: E731
        whole = repeated(naive, bench.device, 0.2 * bench.limit.left(), 3)
        batch = item_batch(bench, tokens)
        fits = tokens_per_pass(moe, sizes.item_tokens, kept_layers=1, kept_tokens=tokens.numel())
        scorer = PrefixScorer(moe, "force", fits)
        scorer.begin(batch, [layer], [])
        one = torch.ones(1, device=bench.device)
        experts = [(expert,) for expert in range(moe.spec(layer).n_experts)]

        def run(sets: Sequence[tuple[int, ...]]) -> None:
            scorer.sets(layer, sets, "one", one)

        few = experts[:2]
        each = min(repeated(lambda: run(few), bench.device, 0.2 * bench.limit.left(), 1)) / len(few)
        allowance = 0.6 * bench.limit.left()
        chosen = experts[: max(len(few), min(len(experts), int(allowance / each / 2)))]
        best = statistics.median(repeated(lambda: run(chosen), bench.device, allowance, 3))
    rate = sizes.items * len(chosen) / best
    part = "" if len(chosen) == len(experts) else f", {len(chosen)} of {len(experts)} experts"
    bench.cells["isolation"] = f"{rate:,.0f}{part}"
    bench.cells["isolation_ratio"] = f"{rate * statistics.median(whole) / sizes.items:.1f}x"


def item_batch(bench: Bench, tokens: Tensor) -> ItemBatch:
    answer = bench.sizes.answer
    raw = [
        {"id": str(number), "domain": "d", "prompt": row[:-answer], "answer": row[-answer:]}
        for number, row in enumerate(tokens.tolist())
    ]
    items = tokenize_items(bench.bridge, check_items(raw))
    return ItemBatch.build(list(range(len(items))), items, bench.device)


def _middle(moe: MoEHooks) -> int:
    return int(moe.layers[len(moe.layers) // 2])  # type: ignore[arg-type]


# what a pass costs on a GPU at its first try, by the passes of the model that were measured; each with room to spare
PARTS = (
    Part("plain forward pass", ("forward",), lambda b: FIRST_PASS * b.on_gpu, measure_forward),
    Part("hooks", ("unhooked", "read", "cached", "every"), lambda b: 30 * b.forward, measure_hooks),
    Part("host waits", ("waits",), lambda b: PROFILER * b.on_gpu + 12 * b.forward, measure_waits),
    Part(
        "naive routes", ("naive",), lambda b: 4 * b.forward * b.passes(b.sizes.copies[0] * b.sizes.pos), measure_naive
    ),
    Part("branches", ("last", "middle", "early", "default"), lambda b: 6 * b.forward, measure_branches),
    Part("layouts of branches", ("compact", "grid", "grid_compiled"), lambda b: 6 * b.forward, measure_layouts),
    Part("isolation", ("isolation", "isolation_ratio"), lambda b: 12 * b.forward, measure_isolation),
)
