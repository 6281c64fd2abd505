"""Router tuning at the last layer: a step from the cache beside one full forward pass a route; and planted repairs.

    python benchmarks/router_tuning.py              # speed, and three seeds of each repair and null
    python benchmarks/router_tuning.py --speed-only

The demo model, one process. A step draws 32 routes for 16 tokens. The naive step scores the same routes by
``score_routes(method="naive")``: one ``run_with_hooks`` of the whole sequence a route, of so few tokens that it takes
seconds, and is scaled to 16.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import moe_interp as mi
from moe_interp.cli.inputs import demo_sequences
from moe_interp.engine.memory import Memory
from moe_interp.experiments.inputs.sequences import read_sequences
from moe_interp.experiments.router_tuning.evaluation import HeldOut
from moe_interp.experiments.router_tuning.options import TuningOptions
from moe_interp.experiments.router_tuning.routers import TunedRouter, frozen
from moe_interp.experiments.router_tuning.token_sources.sources import Sources
from moe_interp.experiments.router_tuning.training import Tuning
from moe_interp.hooks.attach import MoEHooks

NAIVE_TOKENS = 2
STEPS = 20
COMMON: dict[str, Any] = {"select": None, "schedule": "linear", "batch_size": 64, "progress": False}
DRAWN: dict[str, Any] = {"sampler": mi.GumbelTopK(1.0), "n_routes": 16}
WAYS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"lr": 0.02, "epochs": 4},
    "listwise": {"lr": 0.02, "epochs": 3, "temperature": 0.1, **DRAWN},
    "epo": {"lr": 0.02, "epochs": 3, "beta": 1.0, **DRAWN},
}


def speed(moe: MoEHooks) -> None:
    """Seconds a step from the cache, and of the same routes by full forwards."""
    layer, options = moe.layers[-1], TuningOptions(select=None, sampler=mi.GumbelTopK(1.0, 32))
    router = TunedRouter.of(moe, layer)
    given = read_sequences(moe.bridge, demo_sequences(6))
    with frozen(moe, [router]):
        source, _ = Sources(moe, (router,), Memory(moe)).of(given, options.is_selected)
        held, _ = Sources(moe, (router,), Memory(moe)).of(given[:1], torch.isfinite)
        tuning = Tuning(source, (router,), HeldOut(held, (router,), {layer: router.start()}, options, 0), options, "")
        tuning.train_step()
        start = time.perf_counter()
        for _ in range(STEPS):
            tuning.train_step()
        cached = (time.perf_counter() - start) / STEPS
    naive = 0.0
    for row in tuning.rows_of(0)[:NAIVE_TOKENS].tolist():
        tokens = torch.tensor([source.table.sequences[source.table.sequence[row]].tokens])
        pos = int(source.table.pos[row])
        draw = torch.Generator().manual_seed(row)
        scores = torch.rand(*tokens.shape, options.n_routes, router.rule.n_experts, generator=draw)
        routes = scores.topk(router.rule.top_k, dim=-1).indices
        start = time.perf_counter()
        mi.score_routes(moe, tokens, layer, routes, positions=[pos], method="naive")
        naive += time.perf_counter() - start
    naive *= options.batch_size / NAIVE_TOKENS
    print(f"a step of 16 tokens x 32 routes: {cached * 1e3:.1f} ms cached, {naive:.2f} s by full forwards: ", end="")
    print(f"{naive / cached:.0f} times", flush=True)


def damaged(whole: torch.Tensor, how: str, seed: int) -> torch.Tensor:
    """The router's weight with its rows permuted, or with noise of twice its deviation."""
    draw = torch.Generator().manual_seed(seed)
    if how == "permuted":
        return whole[torch.randperm(len(whole), generator=draw)]
    return whole + 2 * whole.std() * torch.randn(whole.shape, generator=draw)


def repairs(moe: MoEHooks) -> None:
    """Share of the lost held-out cross-entropy that tuning the damaged router gives back, three seeds."""
    given = demo_sequences(60)
    held, train = given[::5], [one for i, one in enumerate(given) if i % 5]
    router = TunedRouter.of(moe, moe.layers[-1])
    whole = router.parameter.detach().clone()
    for way, options in WAYS.items():
        found = mi.tune_router(moe, train, objective=way, held_out=held, **COMMON, **options)  # type: ignore[arg-type]
        row = found.held_out().iloc[0]
        sound = row["ce_before"]
        print(f"undamaged, {way}: {sound:.3f}, change {_shown(row)}; adoption {row['adoption']:.2f}", flush=True)
        for how in ("permuted", "noised"):
            for seed in range(3):
                with torch.no_grad():
                    router.parameter.copy_(damaged(whole, how, seed))
                tuned = mi.tune_router(
                    moe,
                    train,
                    objective=way,
                    held_out=held,
                    seed=seed,
                    **COMMON,
                    **options,  # type: ignore[arg-type]
                )
                with torch.no_grad():
                    router.parameter.copy_(whole)
                row = tuned.held_out().iloc[0]
                back = (row["ce_before"] - row["ce"]) / (row["ce_before"] - sound)
                print(
                    f"{how}, {way}, seed {seed}: {row['ce_before']:.3f} to {row['ce']:.3f}, {back:.0%} given back; "
                    f"preference {row['preference']:.2f}, adoption {row['adoption']:.2f}, overlap "
                    f"{row['overlap_before']:.2f} to {row['overlap']:.2f}",
                    flush=True,
                )


def _shown(row: Any) -> str:
    return f"{row['ce_change']:+.4f} [{row['ce_change_low']:+.4f}, {row['ce_change_high']:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    moe, _ = mi.load_demo()
    speed(moe)
    if not arguments.speed_only:
        repairs(moe)


if __name__ == "__main__":
    main()
