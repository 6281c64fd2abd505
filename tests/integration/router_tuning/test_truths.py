"""Known truths: a damaged router is repaired by tuning it alone; where nothing can be learned, nothing is claimed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moe_interp as mi
from moe_interp.cli.inputs import demo_sequences
from moe_interp.experiments.router_tuning.routers import TunedRouter
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.interventions.random_keys import uniform_keys
from tests import tiny

COMMON: dict[str, Any] = {
    "select": None, "lr": 0.02, "schedule": "linear", "batch_size": 64, "evaluate_every": 10**6, "progress": False,
}  # fmt: skip
LISTWISE: dict[str, Any] = {
    **COMMON, "objective": "listwise", "temperature": 0.3, "sampler": mi.GumbelTopK(1.0), "n_routes": 12, "epochs": 2,
}  # fmt: skip
CROSS_ENTROPY: dict[str, Any] = {**COMMON, "objective": "cross_entropy", "epochs": 4}
HELD_OUT, TRAINED = 20, 60  # items of each of the four domains


@pytest.fixture(scope="module")
def demo() -> MoEHooks:
    return mi.load_demo()[0]


def permuted(weight: Tensor) -> Tensor:
    return weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))]


def noised(weight: Tensor) -> Tensor:
    return weight + 2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("damage", "options"), [(permuted, LISTWISE), (noised, CROSS_ENTROPY)])
def test_a_damaged_router_is_repaired(demo: MoEHooks, damage: Any, options: dict[str, Any]) -> None:
    given = demo_sequences(HELD_OUT + TRAINED)
    place = [i % (HELD_OUT + TRAINED) for i in range(len(given))]
    held, train = ([one for one, i in zip(given, place) if (i < HELD_OUT) == is_held] for is_held in (True, False))
    router = TunedRouter.of(demo, demo.layers[-1])
    whole = router.parameter.detach().clone()
    sound = mi.tune_router(demo, train[:2], held_out=held, max_steps=1, **{**CROSS_ENTROPY, "lr": 1e-9})
    try:
        with torch.no_grad():
            router.parameter.copy_(damage(whole))
        found = mi.tune_router(demo, train, held_out=held, **options)
    finally:
        with torch.no_grad():
            router.parameter.copy_(whole)
    row = found.held_out().iloc[0]
    best = sound.held_out().iloc[0]["ce_before"]
    assert row["ce_before"] - best > 0.5
    assert (row["ce_before"] - row["ce"]) / (row["ce_before"] - best) >= 0.8
    assert row["ce_change_high"] < 0
    assert 0 <= row["adoption"] <= 1
    assert "Held-out cross-entropy fell" in found.summary()


# --- nulls --------------------------------------------------------------------------------------------------------


def own_text(moe: MoEHooks, n: int, pos: int, seed: int = 7) -> list[dict[str, Any]]:
    """Sequences whose every token is drawn from the model's own prediction."""
    tokens = torch.full((n, 1), 1)
    for place in range(pos):
        with torch.no_grad():
            policy = moe.bridge(tokens)[:, -1].double().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(policy, uniform_keys(torch.arange(n), 1, seed, place) * policy[:, -1:])
        tokens = torch.cat([tokens, drawn.clamp(max=policy.shape[-1] - 1)], dim=1)
    return [{"id": f"own{i}", "tokens": row} for i, row in enumerate(tokens.tolist())]


def random_text(seed: int, n: int, pos: int) -> list[dict[str, Any]]:
    """Sequences that no model predicts better than by chance."""
    return [{"id": f"r{i}", "tokens": row} for i, row in enumerate(tiny.random_tokens(n, pos, seed=seed).tolist())]


@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_random_weights_learns_nothing(seed: int) -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe", seed=seed), "olmoe", tiny.tiny_tokenizer()))
    drawn = {"sampler": mi.GumbelTopK(1.0), "n_routes": 8}
    for given in (random_text(100 + seed, 60, 12), own_text(moe, 60, 12, seed)):
        for objective in ("epo", "cross_entropy", "listwise", "distill"):
            options = {**COMMON, **drawn, "objective": objective, "lr": 0.01, "batch_size": 32}
            found = mi.tune_router(moe, given[:40], held_out=given[40:], **options)
            assert float(found.data["weight_change"].values[-1].max()) > 0.01
            assert found.held_out().iloc[0]["ce_change_high"] > 0
            assert "cross-entropy fell" not in found.summary()


@pytest.mark.parametrize("objective", ["epo", "listwise"])
def test_text_drawn_from_the_trained_model_itself_teaches_nothing(demo: MoEHooks, objective: str) -> None:
    given = own_text(demo, 60, 20)
    options = {**LISTWISE, "objective": objective, "lr": 3e-3, "batch_size": 32, "epochs": 1}
    found = mi.tune_router(demo, given[:40], held_out=given[40:], **options)
    assert found.held_out().iloc[0]["ce_change_high"] > 0
    assert "cross-entropy fell" not in found.summary()
