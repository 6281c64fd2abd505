"""Losses of router tuning by hand; and a problem of two experts, whose optimum is known, under every objective."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_interp.arch.rules import SoftmaxTopK
from moe_interp.errors import ConfigError
from moe_interp.experiments.inputs.sequences import ScoredSequence
from moe_interp.experiments.router_tuning.evaluation import HeldOut
from moe_interp.experiments.router_tuning.objectives import (
    better_route,
    distill_loss,
    epo_loss,
    listwise_loss,
    repeated,
    route_log_policy,
)
from moe_interp.experiments.router_tuning.options import TuningOptions
from moe_interp.experiments.router_tuning.routers import TunedRouter
from moe_interp.experiments.router_tuning.summary import preference_words
from moe_interp.experiments.router_tuning.token_sources.last_layer import FileOrMemory, LastLayerTokens
from moe_interp.experiments.router_tuning.token_sources.tokens import TokenTable
from moe_interp.experiments.router_tuning.training import Tuning
from moe_interp.routes import AllSubsets, GumbelTopK

POLICY = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
ROUTES = torch.tensor([[[0, 1], [1, 0], [2, 3], [1, 2]], [[3, 2], [0, 1], [1, 0], [0, 2]]])
CE = torch.tensor([[2.0, 2.0, 1.5, 1.8], [0.5, 0.9, 0.9, 0.7]], dtype=torch.float64)


def test_the_better_route_is_the_best_drawn_one_where_it_improves() -> None:
    better, gain = better_route(ROUTES, CE)
    assert better.tolist() == [[2, 3], [-1, -1]]
    assert gain.tolist() == [0.5, 0.0]
    better, gain = better_route(ROUTES, CE.masked_fill(CE == 1.5, float("nan")))
    assert better.tolist()[0] == [1, 2]
    assert gain[0] == pytest.approx(0.2)


def test_epo_by_hand() -> None:
    better, gain = better_route(ROUTES, CE)
    reference = torch.full((2, 4), 0.25, dtype=torch.float64).log()
    margin = math.log(0.125 * 0.125) - math.log(0.5 * 0.25)  # the uniform reference cancels
    for given in (reference, None):
        loss = epo_loss(POLICY, given, ROUTES[:, 0], better, gain, beta=0.3)
        assert float(loss[0]) == pytest.approx(0.5 * math.log(1 + math.exp(-0.3 * margin)))
        assert float(loss[1]) == 0


def test_listwise_and_distillation_by_hand() -> None:
    assert repeated(ROUTES).tolist() == [[False, True, False, False], [False, False, True, False]]
    loss = listwise_loss(POLICY, ROUTES, CE, temperature=0.5)
    for token, kept in enumerate(([0, 2, 3], [0, 1, 3])):
        q = np.exp(-CE[token, kept].numpy() / 0.5)
        p = np.exp([sum(float(POLICY[token, e]) for e in ROUTES[token, r].tolist()) for r in kept])
        q, p = q / q.sum(), p / p.sum()
        assert float(loss[token]) == pytest.approx(float((q * np.log(q / p)).sum()))
    better, _ = better_route(ROUTES, CE)
    assert distill_loss(POLICY, better).tolist() == pytest.approx([math.log(8), 0.0])
    assert route_log_policy(POLICY, torch.tensor([[0, -1], [-1, -1]])).tolist() == pytest.approx([math.log(0.5), 0.0])


def test_losses_have_finite_gradients_where_routes_are_missing() -> None:
    leaf = POLICY.clone().requires_grad_()
    ce = CE.clone()
    ce[:, 3] = float("nan")
    routes = ROUTES.clone()
    routes[:, 3] = -1
    better, gain = better_route(routes, ce)
    total = epo_loss(leaf, POLICY, routes[:, 0], better, gain, 0.1).sum()
    (total + listwise_loss(leaf, routes, ce, 1.0).sum() + distill_loss(leaf, better).sum()).backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize(
    "options", [{"beta": 0}, {"schedule": "step"}, {"reference": "moving"}, {"weight_decay": -1}, {"warmup": -1}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        TuningOptions(**options)


def test_learning_rates() -> None:
    assert [TuningOptions(lr=1.0, warmup=2).rate(s, 6) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert [TuningOptions(lr=1.0, schedule="linear").rate(s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert TuningOptions(lr=1.0, schedule="cosine").rate(2, 4) == pytest.approx(0.5)


# --- two experts, one a token: expert c predicts class c, and the token's state says its class --------------------


def two_experts(objective: str, seed: int) -> tuple[Tuning, Tensor]:
    """A run on 40 tokens, and their classes. The untuned router sends every token to the wrong expert."""
    draw = torch.Generator().manual_seed(seed)
    classes = torch.arange(40) % 2
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    x[:, 0] = (2.0 * classes - 1) * (0.5 + x[:, 0].abs())
    sequences = [ScoredSequence(f"s{i}", (5, int(c)), np.array([True, False])) for i, c in enumerate(classes)]
    table = TokenTable(sequences, np.arange(40), np.zeros(40, dtype=np.int64), torch.ones(40, dtype=torch.float64))
    rule = SoftmaxTopK(n_experts=2, top_k=1)
    owner = nn.Linear(6, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        owner.weight.zero_()
        owner.weight[0, 0], owner.weight[1, 0] = 0.3, -0.3
    router = TunedRouter(0, "gate.weight", owner, owner.weight, rule)
    outputs = torch.eye(2, dtype=torch.float64).mul(4).expand(40, 2, 2)
    rest = torch.zeros(40, 2, dtype=torch.float64)
    source = LastLayerTokens(table, router, x, rest, lambda rows, needed: outputs[rows], nn.Identity(), x.device)
    options = TuningOptions(
        objective, sampler=AllSubsets(), n_routes=1, lr=0.1, epochs=15, batch_size=10, beta=1.0, clip=None
    )
    held_out = HeldOut(source, (router,), {0: router.start()}, options, 0)
    return Tuning(source, (router,), held_out, options, ""), classes


@pytest.mark.parametrize("objective", ["epo", "cross_entropy", "listwise", "distill"])
def test_two_experts_are_learned_by_every_objective(objective: str) -> None:
    for seed in range(3):
        tuning, classes = two_experts(objective, seed)
        tuning.run(lambda done, total: None)
        start, end = (tuning.history.evaluations[at][2] for at in (0, -1))
        x = tuning.source.open(torch.arange(40), {}).inputs[0]
        assert (x @ tuning.start[0].T).argmax(-1).tolist() == (1 - classes).tolist()
        assert (x @ tuning.weights[0].detach().T).argmax(-1).tolist() == classes.tolist()
        assert end.ce.mean() < 0.5 < 1.0 < start.ce.mean()
        if objective != "cross_entropy":  # r+ is the other expert, for every token
            assert start.per_token["adoption"].tolist() == [[0.0]] * 40
        assert end.per_token["adoption"].tolist() == end.per_token["preference"].tolist() == [[1.0]] * 40


def test_tensors_go_to_the_disk_where_memory_is_short(tmp_path: Any) -> None:
    storage = FileOrMemory(200, tmp_path / "cache")
    small, large = storage.empty((10,), torch.float64), storage.empty((7, 3), torch.bfloat16)
    assert not storage.is_on_disk
    wide = storage.empty((50, 4), torch.bfloat16)
    assert storage.is_on_disk
    for value in (small, large, wide):
        value.fill_(1.5)
        assert float(value.sum()) == 1.5 * value.numel()
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 1
    del storage
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_preference_without_adoption_is_said_in_words() -> None:
    row = {"preference": 0.9, "preference_low": 0.8, "preference_high": 0.95, "overlap": 0.31, "overlap_before": 0.3}
    row |= {"adoption": 0.01, "adoption_low": 0.0, "adoption_high": 0.03, "ce_change_low": -0.2, "ce_change_high": 0.1}
    row |= {"n_sequences": 20, "n_better": 18}
    assert preference_words(row).startswith("Preference rose without adoption: preference accuracy 0.90 [0.80, 0.95]")
    assert "takes others." in preference_words(row)
    assert "better than before all the same" in preference_words(row | {"ce_change_high": -0.1})
    taken = row | {"adoption": 0.4, "adoption_low": 0.3}
    assert preference_words(taken).startswith("Preference rose, and better routes are taken: ")
    unsure = preference_words(row | {"adoption": 0.4})
    assert unsure.startswith("Preference rose; whether better routes are taken is not shown: ")
    assert preference_words(row | {"preference_low": 0.4}).startswith("Preference did not rise")
    fell = row | {"preference": 0.2, "preference_low": 0.1, "preference_high": 0.4}
    assert preference_words(fell).startswith("Preference fell")
    for few in (row | {"n_better": 5}, row | {"preference_low": float("nan"), "preference_high": float("nan")}):
        assert preference_words(few).startswith("Too few sequences have better routes to say")
    assert preference_words(row | {"preference": float("nan")}).startswith("No drawn route")


def test_gumbel_draws_may_repeat_the_routers_own_route() -> None:
    from moe_interp.experiments.router_tuning.step import draw
    from moe_interp.routes import TokenKeys

    logits = torch.tensor([[9.0, 0.0, 0.0, -1.0]], dtype=torch.float64)
    keys = TokenKeys(0, 0, torch.tensor([3]), torch.tensor([1]))
    drawn = draw(GumbelTopK(0.1), logits, torch.tensor([[0]]), 5, keys)
    assert drawn.tolist() == [[[0]] * 5]
