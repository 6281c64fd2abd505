"""What benchmarks/gpu.py measures once: exactness, the matrix product, a whole experiment, a step of the testbed."""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from gpu_model import build
from gpu_parts import EXPERT_OUT, ROUTER_HOOKS, Bench, random_routes, readers
from gpu_shapes import SHAPES, Sizes
from gpu_timing import Limit, repeated, seconds_of

import moe_interp as mi
from moe_interp.experiments.counterfactual.experiment import counterfactual_routes
from moe_interp.hooks.attach import attach
from moe_interp.testbed.domains.registry import load_domains
from moe_interp.testbed.presets import PAPER, SMOKE
from moe_interp.testbed.training.compilation import DEFAULT_BACKEND, NotCompiledWarning
from moe_interp.testbed.training.trainer import Trainer

BOUND = 2e-5  # nats, between branches and full passes in float32
OUTPUTS_BOUND = 1e-4  # of the largest logit, where experts' outputs are hooked
STEPS = 4
COMPILING = 75.0  # seconds, on a GPU: the compiler, and some steps


@torch.no_grad()
def measure_exactness(sizes: Sizes, device: torch.device, cells: dict[str, str], *, tiny: bool) -> bool:
    """On a few layers of OLMoE's shape in float32: branches against full passes, and hooks that change nothing."""
    bridge = build(SHAPES["olmoe"], device, torch.float32, tiny=tiny, layers=sizes.exact_layers)
    vocabulary = int(bridge.cfg.d_vocab)
    tokens = torch.randint(3, vocabulary, (1, sizes.exact_tokens), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    plain = bridge(tokens)
    noise = float((bridge(tokens) - plain).abs().max())  # sums in another order each time, on some cards
    with attach(bridge) as moe:

        def change(pattern: re.Pattern[str]) -> float:
            """By hooks that only look, and by hooks that hand back what they were given."""
            looking = readers(bridge, pattern)
            both = looking, [(name, lambda value, hook: value) for name, _ in looking]
            return max(float((bridge.run_with_hooks(tokens, fwd_hooks=hooks) - plain).abs().max()) for hooks in both)

        changed, outputs = change(ROUTER_HOOKS), change(EXPERT_OUT)
        layer = moe.layers[1]
        shape = (1, sizes.exact_tokens, sizes.exact_routes)
        routes = random_routes(shape, moe.spec(layer).n_experts, moe.spec(layer).top_k, device)
        positions = [0, 1, sizes.exact_tokens // 2, sizes.exact_tokens - 2]
        scores = [mi.score_routes(moe, tokens, layer, routes, positions, method=m) for m in ("branch", "naive")]
    difference = float((scores[0] - scores[1])[0, positions].abs().max())
    # experts' outputs are computed for their slots and summed anew, which rounds otherwise
    largest = OUTPUTS_BOUND * float(plain.abs().max())
    are_close, is_same = difference <= BOUND, changed <= 2 * noise and outputs <= 2 * noise + largest
    cells["exact_branches"] = f"{difference:.1e}" + ("" if are_close else " EXCEEDED")
    said = f"{changed:.1e}, `expert_out` {outputs:.1e}, two plain passes {noise:.1e}"
    cells["exact_hooks"] = said + ("" if is_same else " EXCEEDED")
    return are_close and is_same


def measure_gemm(sizes: Sizes, device: torch.device, dtype: torch.dtype, cells: dict[str, str]) -> float:
    """Operations a second of one large matrix product, best of several after a warm-up."""
    a, b = (torch.randn(sizes.gemm, sizes.gemm, device=device, dtype=dtype) for _ in range(2))
    seconds_of(lambda: a @ b, device)
    many = 10
    best = min(seconds_of(lambda: [a @ b for _ in range(many)], device) for _ in range(3))
    rate = many * 2 * sizes.gemm**3 / best
    cells["gemm"] = f"{rate / 1e12:.3g} TFLOP/s, {str(dtype).removeprefix('torch.')}"
    return float(rate)


@torch.no_grad()
def measure_experiment(bench: Bench, cells: dict[str, str]) -> None:
    """``counterfactual_routes`` whole, where the time holds it; else extrapolated from a part.

    What a run costs whatever its size (the identity of the weights) is measured on a few tokens of one layer. The part
    has one sequence and two layers equally far from both ends: the cost of a layer falls evenly towards the last.
    """
    sizes = bench.sizes
    rows = bench.tokens(sizes.sequences, sizes.sequence_tokens, seed=2).tolist()
    sequences = [{"id": str(number), "tokens": row} for number, row in enumerate(rows)]
    with attach(bench.bridge) as moe:

        def run(chosen: list[dict[str, Any]], layers: list[Any]) -> Callable[[], Any]:
            return lambda: counterfactual_routes(moe, chosen, layers, n_routes=sizes.routes, progress=False)

        every = list(moe.layers)
        quarter = len(every) // 4
        few = [{"id": "few", "tokens": rows[0][:8]}]
        fixed = min(repeated(run(few, every[:1]), bench.device, 0.2 * bench.limit.left(), 1))
        part_layers = [every[quarter], every[-1 - quarter]]
        part = max(seconds_of(run(sequences[:1], part_layers), bench.device) - fixed, 1e-9)
        share = 2 / len(every) / sizes.sequences
        seconds, said = fixed + part / share, f", extrapolated from {share:.1%} of it"
        if seconds <= bench.limit.left():
            seconds, said = seconds_of(run(sequences, every), bench.device), ""
    n_routes = sizes.sequences * (sizes.sequence_tokens - 1) * len(every) * sizes.routes
    cells["experiment"] = f"{seconds:.1f} s for {n_routes:,} routes, {n_routes / seconds:,.0f} a second{said}"


def measure_paper(
    device: torch.device, limit: Limit, cells: dict[str, str], say: Callable[[str], None], *, tiny: bool
) -> None:
    """Steps of the testbed on a small part of its data, the same model, tokens a step and strategy; then compiled.

    A run of the preset's length is compiled on a GPU, one of a few steps is not unless that is asked for.
    """
    n_steps = 2 * STEPS + 3  # a warm-up each, and the one that compiles
    size = {"steps": n_steps, "data_scale": 0.05, "validation_sequences": 8, "strategy": "micro_batch"}
    small = {"micro_batch": 4, "domains": ("facts", "puzzles"), "data_scale": 0.01}
    config = SMOKE.model_copy(update=size | small) if tiny else PAPER.model_copy(update=size)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    accelerator, precision = Accelerator(cpu=not on_gpu), "bf16" if on_gpu else "no"
    trainer = Trainer(config, load_domains(config), accelerator, precision, device, compile=False)
    millions = sum(p.numel() for p in trainer.bridge.original_model.parameters()) / 1e6
    tokens = config.length * config.micro_batch * config.micro_batches

    def steps(row: str, before: float) -> None:
        seconds = statistics.median(repeated(trainer.train_step, device, limit.left(), STEPS))
        trainer.check()
        peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.0f} GiB" if on_gpu else ""
        said = f"{tokens:,} tokens in {seconds:.2f} s, {millions:.3g}M parameters{peak}"
        compiled = f", {before:.0f} s to compile" if before else ""
        cells[row] = f"{tokens / seconds:,.0f} tokens a second ({said}{compiled})"

    steps("paper", 0.0)
    if limit.left() < COMPILING * on_gpu:
        say(f"compiled steps skipped: about {COMPILING:.0f} s needed, {max(limit.left(), 0.0):.1f} s left")
        return
    trainer.backend = DEFAULT_BACKEND if on_gpu else "eager"  # the processor's compiler is not what is measured
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotCompiledWarning)
        first = seconds_of(trainer.train_step, device)
    steps("paper_compiled", first)
