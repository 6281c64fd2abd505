"""Router tuning at the last layer: a step from the cache beside one full forward pass a route; and planted repairs.

    python benchmarks/router_tuning.py              # speed, three seeds of each repair, and a sound router
    python benchmarks/router_tuning.py --speed-only
    python benchmarks/router_tuning.py --repairs-only

The demo model, one process. A step draws 32 routes for 16 tokens. The naive step scores the same routes by
``score_routes(method="naive")``: one ``run_with_hooks`` of the whole sequence a route, of so few tokens that it takes
seconds, and is scaled to 16.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

import moe_interp as mi
from moe_interp.cli.inputs import demo_sequences
from moe_interp.engine.memory import Memory
from moe_interp.experiments.inputs.sequences import read_sequences
from moe_interp.experiments.router_tuning.evaluation import HeldOut
from moe_interp.experiments.router_tuning.objectives import distill_loss
from moe_interp.experiments.router_tuning.options import TuningOptions
from moe_interp.experiments.router_tuning.routers import TunedRouter, frozen
from moe_interp.experiments.router_tuning.token_sources.sources import Sources
from moe_interp.experiments.router_tuning.token_sources.tokens import TokenSource
from moe_interp.experiments.router_tuning.training import Tuning
from moe_interp.hooks.attach import MoEHooks

NAIVE_TOKENS = 2
STEPS = 20
SEEDS = range(3)
HELD_OUT, TRAINED = 40, 100  # items of each domain: the first ones, and those after them
COMMON: dict[str, Any] = {"select": None, "schedule": "linear", "batch_size": 64, "lr": 0.02, "progress": False}
DRAWN: dict[str, Any] = {"sampler": mi.GumbelTopK(1.0), "n_routes": 16}
# chosen on other items and other damages (seed 10) than those reported
WAYS: dict[str, dict[str, Any]] = {
    "epo": {"epochs": 3, "beta": 0.3, "reference": None, **DRAWN},
    "cross_entropy": {"epochs": 4},
    "listwise": {"epochs": 3, "temperature": 0.3, **DRAWN},
    "distill": {"epochs": 3, "lr": 0.05, **DRAWN},
}
DAMAGES = ("permuted", "noised")


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


def split() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sequences to train on and held-out ones. Numbers of items say their kind (steps of arithmetic), so both are runs
    of numbers: every fifth one would hold out problems of one step only."""
    given = demo_sequences(HELD_OUT + TRAINED)
    place = [i % (HELD_OUT + TRAINED) for i in range(len(given))]
    train, held = ([one for one, i in zip(given, place) if (i < HELD_OUT) == is_held] for is_held in (False, True))
    return train, held


def repairs(moe: MoEHooks) -> None:
    """Share of the lost held-out cross-entropy that tuning the damaged router gives back, three seeds of each."""
    train, held = split()
    router = TunedRouter.of(moe, moe.layers[-1])
    whole = router.start()
    cached = Sources(moe, (router,), Memory(moe))
    source, held_tokens = (cached.of(read_sequences(moe.bridge, some), torch.isfinite)[0] for some in (train, held))
    sound = cross_entropies(held_tokens, router, whole)
    print(
        f"{len(source.table)} tokens to train on, {len(held_tokens.table)} held out; undamaged {sound.mean():.3f} nats"
    )
    for seed in SEEDS:
        for how in DAMAGES:
            start = damaged(whole, how, seed)
            before = cross_entropies(held_tokens, router, start)
            print(f"{how}, seed {seed}: {before.mean():.3f} nats. Taught by the undamaged router:", end="", flush=True)
            for taught in ("policy", "experts"):
                weight = distilled(source, router, start, whole, taught == "policy")
                back = given_back(held_tokens, before, cross_entropies(held_tokens, router, weight), sound)
                print(f" its {taught} {back}", end=";", flush=True)
            print()
            for way, options in WAYS.items():
                with torch.no_grad():
                    router.parameter.copy_(start)
                try:
                    found = mi.tune_router(
                        moe,
                        train,
                        objective=way,  # type: ignore[arg-type]
                        held_out=held,
                        seed=seed,
                        evaluate_every=10**6,
                        **COMMON | options,
                    )
                finally:
                    with torch.no_grad():
                        router.parameter.copy_(whole)
                row, weight = found.held_out().iloc[0], start + next(iter(found.delta.values()))
                after = cross_entropies(held_tokens, router, weight)
                assert abs(float(after.mean()) - row["ce"]) < 1e-4
                back = given_back(held_tokens, before, after, sound)
                was, now = (agreement(held_tokens, router, one, whole) for one in (start, weight))
                print(
                    f"  {way}: {row['ce_before']:.3f} to {row['ce']:.3f}, {back} "
                    f"given back; preference {row['preference']:.2f}, adoption {row['adoption']:.2f}, overlap "
                    f"{row['overlap_before']:.2f} to {row['overlap']:.2f}; route of the undamaged router {was:.2f} to "
                    f"{now:.2f}",
                    flush=True,
                )


def sound_router(moe: MoEHooks) -> None:
    """The same options on the router as it is, where there is nothing to repair."""
    train, held = split()
    for way, options in WAYS.items():
        for name, more in (("repair's options", {}), ("learning rate 3e-4", {"lr": 3e-4})):
            chosen = COMMON | options | more
            found = mi.tune_router(moe, train, objective=way, held_out=held, **chosen)  # type: ignore[arg-type]
            row = found.held_out().iloc[0]
            change = f"{row['ce_change']:+.4f} [{row['ce_change_low']:+.4f}, {row['ce_change_high']:+.4f}]"
            print(f"undamaged, {way}, {name}: {row['ce_before']:.3f}, change {change}", flush=True)


@torch.no_grad()
def cross_entropies(tokens: TokenSource, router: TunedRouter, weight: torch.Tensor) -> torch.Tensor:
    """``[token]`` under a router's weight, in nats."""
    found = []
    for rows in torch.arange(len(tokens.table)).split(512):
        opened = tokens.open(rows, {})
        found.append(opened.own_ce({router.layer: router.logits(opened.inputs[router.layer], weight)}))
    return torch.cat(found).double()


def given_back(tokens: TokenSource, before: torch.Tensor, after: torch.Tensor, sound: torch.Tensor) -> str:
    """(before - after) / (before - sound) of the held-out tokens, with its interval over sequences."""
    sums = np.zeros((2, len(tokens.table.sequences)))
    for row, values in zip(sums, (before - after, before - sound)):
        np.add.at(row, tokens.table.sequence, values.numpy())
    found = mi.stats.ratio_interval(*sums)
    return f"{float(found.estimate):.0%} [{float(found.low):.0%}, {float(found.high):.0%}]"


def distilled(
    tokens: TokenSource, router: TunedRouter, start: torch.Tensor, whole: torch.Tensor, is_policy: bool
) -> torch.Tensor:
    """A weight trained from ``start`` on the same tokens by the undamaged router itself, the most that tuning
    can hope for: towards its policy, or only towards the experts that it takes."""
    layer, rule, weight = router.layer, router.rule, start.clone().requires_grad_()
    n_steps = 3 * -(-len(tokens.table) // COMMON["batch_size"])
    optimizer = torch.optim.AdamW([weight], lr=COMMON["lr"], weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = COMMON["lr"] * (1 - step / n_steps)
        inputs = tokens.open(torch.randint(len(tokens.table), (COMMON["batch_size"],), generator=draw), {}).inputs[
            layer
        ]
        wanted, found = rule.log_policy(router.logits(inputs, whole)), rule.log_policy(router.logits(inputs, weight))
        if is_policy:
            loss = (wanted.exp() * (wanted - found)).sum(dim=-1).mean()
        else:
            loss = distill_loss(found, rule.route(wanted)[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    return weight.detach()


@torch.no_grad()
def agreement(tokens: TokenSource, router: TunedRouter, weight: torch.Tensor, whole: torch.Tensor) -> float:
    """Share of the tokens that take the route of the undamaged router."""
    inputs = tokens.open(torch.arange(len(tokens.table)), {}).inputs[router.layer]
    one, other = (router.rule.route(router.logits(inputs, w))[0].sort(dim=-1).values for w in (weight, whole))
    return float((one == other).all(dim=-1).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--repairs-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    moe, _ = mi.load_demo()
    if not arguments.repairs_only:
        speed(moe)
    if not arguments.speed_only:
        repairs(moe)
        sound_router(moe)


if __name__ == "__main__":
    main()
