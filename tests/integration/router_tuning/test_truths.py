"""Known truths: a damaged router is repaired by tuning it alone; text of the model's own teaches it nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_interp as mi
from moe_interp.cli.inputs import demo_sequences
from moe_interp.experiments.router_tuning.routers import TunedRouter
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.random_keys import uniform_keys

LISTWISE: dict[str, Any] = {
    "objective": "listwise", "temperature": 0.1, "sampler": mi.GumbelTopK(1.0), "n_routes": 12, "select": None,
    "lr": 0.02, "schedule": "linear", "batch_size": 64, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> MoEHooks:
    return mi.load_demo()[0]


def test_a_damaged_router_is_repaired(demo: MoEHooks) -> None:
    given = demo_sequences(48)
    held, train = given[::5], [one for i, one in enumerate(given) if i % 5]
    router = TunedRouter.of(demo, demo.layers[-1])
    order = torch.randperm(len(router.parameter), generator=torch.Generator().manual_seed(0))
    whole = router.parameter.detach().clone()
    sound = mi.tune_router(demo, train, held_out=held, max_steps=1, **{**LISTWISE, "n_routes": 1})
    try:
        with torch.no_grad():
            router.parameter.copy_(whole[order])
        found = mi.tune_router(demo, train, held_out=held, epochs=2, **LISTWISE)
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


def own_text(moe: MoEHooks, n: int, pos: int) -> list[dict[str, Any]]:
    """Sequences whose every token is drawn from the model's own prediction."""
    tokens = torch.full((n, 1), 1)
    for place in range(pos):
        with torch.no_grad():
            policy = moe.bridge(tokens)[:, -1].double().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(policy, uniform_keys(torch.arange(n), 1, 7, place) * policy[:, -1:])
        tokens = torch.cat([tokens, drawn.clamp(max=policy.shape[-1] - 1)], dim=1)
    return [{"id": f"own{i}", "tokens": row} for i, row in enumerate(tokens.tolist())]


@pytest.mark.parametrize("objective", ["epo", "listwise"])
def test_text_drawn_from_the_model_itself_teaches_nothing(demo: MoEHooks, objective: str) -> None:
    given = own_text(demo, 60, 20)
    options = {**LISTWISE, "objective": objective, "lr": 3e-3, "batch_size": 32}
    found = mi.tune_router(demo, given[:40], held_out=given[40:], **options)
    row = found.held_out().iloc[0]
    assert row["ce_change_high"] > 0
    assert "cross-entropy fell" not in found.summary()
