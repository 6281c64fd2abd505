"""Choice logits are on one scale in every family: a sampler's law against one written in numpy from the layer alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_interp.arch.families import build_spec, find_container
from moe_interp.arch.rules import RoutingRule, SigmoidTopK, SoftmaxTopK
from moe_interp.interventions.random_keys import uniform_keys
from moe_interp.routes import GumbelTopK, TokenKeys
from tests import tiny

Floats = NDArray[np.float64]
SIGMOID = (
    *("deepseek_v3", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "minimax_m2", "lfm2_moe", "afmoe", "nemotron_h"),
    *("laguna", "llama4", "llama4_vl"),
)
BY_TWO_BEST = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa")  # groups; deepseek_v2's by their best
N = 4_000  # draws


def scores_of(name: str, logits: Floats) -> Floats:
    """What a family ranks by, but for its bias and groups."""
    if name in SIGMOID:
        capped = 3.0 * np.tanh(logits / 3.0) if name == "laguna" else logits
        return np.asarray(1 / (1 + np.exp(-capped)))
    if name == "deepseek_v4":
        return np.asarray(np.sqrt(np.logaddexp(0, logits)))
    return np.asarray(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))


def choice_scores(name: str, layer: tiny.NativeMoE, logits: Floats) -> Floats:
    """``[token, expert]``, with correction bias; -inf in shut groups."""
    biases = [v for k, v in tiny.routing_state(layer).items() if "bias" in k and v.numel() == logits.shape[-1]]
    choice = scores_of(name, logits)
    if biases and name != "gpt_oss":  # whose bias is one of the logits
        choice = choice + biases[0].double().numpy().reshape(-1)
    if name in (*BY_TWO_BEST, "deepseek_v2"):
        groups = choice.reshape(len(choice), 4, 2)
        best = groups.sum(-1) if name in BY_TWO_BEST else groups.max(-1)
        is_excluded = best.argsort(-1).argsort(-1) < 2
        choice = np.where(np.repeat(is_excluded, 2, axis=-1), -np.inf, choice)
    return np.asarray(choice)


def law(odds: Floats, k: int) -> Floats:
    """The probability of each set of k experts, drawn one by one with these odds, without replacement."""
    found = []
    for members in combinations(range(len(odds)), k):
        total = 0.0
        for order in permutations(members):
            left, probability = odds.sum(), 1.0
            for expert in order:
                probability *= odds[expert] / left if left > 0 else 0.0
                left -= odds[expert]
            total += probability
        found.append(total)
    return np.array(found)


def counted(rule: RoutingRule, logits: Tensor, tau: float) -> Floats:
    """How often the sampler draws each set for one token."""
    uniforms = uniform_keys(torch.arange(N), rule.n_experts, 11).view(1, N, rule.n_experts)
    drawn = GumbelTopK(tau).draw(rule.choice_logits(logits.unsqueeze(0)), uniforms, rule.top_k)[0].sort(-1).values
    sets = torch.tensor(list(combinations(range(rule.n_experts), rule.top_k)))
    return (drawn.unsqueeze(1) == sets).all(-1).sum(0).double().numpy()


def layer_of(name: str) -> tuple[tiny.NativeMoE, RoutingRule]:
    """The last MoE layer of a tiny model."""
    layer = list(tiny.native_layers(tiny.build_hf(name)).values())[-1]
    found = find_container(layer.block)
    assert found is not None
    return layer, build_spec(*found, layer.block, layer.label).rule


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_the_law_of_a_draw_is_that_of_the_choice_scores(family: str, tau: float) -> None:
    layer, rule = layer_of(family)
    logits = 2 * torch.randn(12, rule.n_experts, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    choice = choice_scores(family, layer, logits.numpy())
    enough = np.flatnonzero((choice > 0).sum(-1) > rule.top_k)[:3]
    assert len(enough) == 3
    for token in enough:
        odds = np.where(choice[token] > 0, np.maximum(choice[token], 0) ** (1 / tau), 0.0)
        expected, found = N * law(odds, rule.top_k), counted(rule, logits[token].float(), tau)
        is_likely = expected > 5
        rest = expected[~is_likely].sum()
        assert found[~is_likely].sum() < rest + 5 * math.sqrt(rest + 1)
        seen, wanted = found[is_likely], expected[is_likely]
        if is_likely.sum() > 1:
            assert scipy.stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3, (family, token)


def test_without_bias_and_groups_experts_are_drawn_with_the_routers_own_probabilities(family: str) -> None:
    rule = layer_of(family)[1]
    if getattr(rule, "bias", None) is not None or getattr(rule, "group_score", None) is not None:
        pytest.skip("a bias or groups enter the choice")
    logits = 5 * torch.randn(20, rule.n_experts, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rule.choice_logits(logits).log_softmax(-1), rule.log_policy(logits))


def test_as_the_temperature_falls_a_draw_becomes_the_route_of_the_model(family: str) -> None:
    layer, rule = layer_of(family)
    if hasattr(layer.router, "tid2eid"):
        pytest.skip("chosen by token id")
    logits = 3 * torch.randn(1, 200, rule.n_experts, generator=torch.Generator().manual_seed(1))
    indices, _ = rule.route(logits)
    uniforms = uniform_keys(torch.arange(200), rule.n_experts, 5).unsqueeze(1)
    drawn = GumbelTopK(1e-9).draw(rule.choice_logits(logits)[0], uniforms, rule.top_k)[:, 0]
    kept = (indices[0] >= 0).all(-1)  # a capacity drops tokens
    assert torch.equal(drawn.sort(-1).values[kept], indices[0].sort(-1).values[kept])


# -- correction biases that leave nothing positive -----------------------------------------------------------------

BIASES: dict[str, Callable[[int], Tensor]] = {
    "all very negative": lambda n: torch.linspace(-3, -2, n),
    "all very positive": lambda n: torch.linspace(14, 14.2, n),
    "of both signs": lambda n: torch.linspace(-1, 0.2, n),
    "one expert alone": lambda n: torch.where(torch.arange(n) == 2, 0.5, -2.0),
    "the same for all": lambda n: torch.full((n,), -4.0),
}
GROUPS: dict[str, dict[str, Any]] = {
    "no groups": {},
    "groups": {"n_groups": 4, "top_groups": 2, "group_score": "top2"},
    "shut groups at zero": {"n_groups": 4, "top_groups": 2, "group_score": "top2", "excluded_score": 0.0},
}


@pytest.mark.parametrize("groups", GROUPS, ids=lambda name: name.replace(" ", "_"))
@pytest.mark.parametrize("bias", BIASES, ids=lambda name: name.replace(" ", "_"))
@pytest.mark.parametrize("kind", [SigmoidTopK, SoftmaxTopK], ids=["sigmoid", "softmax"])
def test_any_bias_leaves_finite_choice_logits_in_the_order_of_the_family(kind: Any, bias: str, groups: str) -> None:
    rule = kind(n_experts=16, top_k=3, bias=BIASES[bias](16), **GROUPS[groups])
    logits = 2 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    choice = rule.choice_logits(logits)
    assert not bool((choice.isnan() | choice.isposinf()).any())
    ranked, scored = rule.route(logits)[0], rule._choice(rule.scores(logits), rule.excluded_score)
    # ties (shut experts at zero) may be broken either way: what is compared is the score of what is taken
    taken = choice.topk(3).indices
    torch.testing.assert_close(scored.gather(-1, taken).sum(-1), scored.gather(-1, ranked).sum(-1), rtol=0, atol=1e-6)
    keys = TokenKeys(0, 0, torch.zeros(1, dtype=torch.int64), torch.arange(50))
    sampled = GumbelTopK().sample(choice, ranked, 6, keys)
    assert int(sampled.n_distinct.min()) == 6


def test_a_bias_that_all_experts_share_changes_no_law() -> None:
    logits = 2 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    plain = SigmoidTopK(n_experts=8, top_k=2).choice_logits(logits)
    shifted = SigmoidTopK(n_experts=8, top_k=2, bias=torch.full((8,), 14.0)).choice_logits(logits)
    torch.testing.assert_close(shifted, plain)
    own = torch.tensor([0.0, 0.1, 0.0, 0.3, 0.2, 0.0, 0.05, 0.0])
    biased = SigmoidTopK(n_experts=8, top_k=2, bias=own).choice_logits(logits)
    for shared in (7.0, -7.3):
        moved = own + shared if shared > 0 else own - own.max() + shared
        found = SigmoidTopK(n_experts=8, top_k=2, bias=moved).choice_logits(logits)
        if shared > 0:
            torch.testing.assert_close(found, biased, rtol=0, atol=1e-3)
        else:  # the expert that is punished least keeps its own score
            torch.testing.assert_close(found[:, 3], plain[:, 3].double(), rtol=0, atol=1e-3)


def test_the_logarithm_goes_on_below_zero_and_rises_throughout() -> None:
    bias = torch.linspace(-1.0, 0.0, 12)
    rule = SigmoidTopK(n_experts=12, top_k=2, bias=bias)
    logits = torch.zeros(1, 12)  # scores of 1/2: choice scores from -1/2 to 1/2
    found = rule.choice_logits(logits)[0]
    assert bool((found.diff() > 0).all())
    positive = bias + 0.5 > 1e-6
    torch.testing.assert_close(found[positive].exp(), (bias + 0.5)[positive].double(), rtol=1e-6, atol=0)
    assert float(found[~positive].max()) < math.log(1e-6)


def test_a_drawn_route_has_more_of_the_standard_one_than_a_uniform_one_at_the_sizes_of_real_models() -> None:
    generator = torch.Generator().manual_seed(0)
    for rule, is_open in (
        (SigmoidTopK(n_experts=256, top_k=8, n_groups=8, top_groups=4, group_score="top2", bias=torch.zeros(256)), 128),
        (SigmoidTopK(n_experts=256, top_k=8, bias=0.01 * torch.randn(256, generator=generator)), 256),
        (SoftmaxTopK(n_experts=64, top_k=6, bias=0.001 * torch.randn(64, generator=generator)), 64),
        (SoftmaxTopK(n_experts=64, top_k=8), 64),
    ):
        # centred where scores are small, as those of a trained router are
        logits = 2 * torch.randn(40, rule.n_experts, generator=generator) - 4
        uniforms = uniform_keys(torch.arange(40), 50 * rule.n_experts, 3).view(40, 50, -1)
        drawn = GumbelTopK().draw(rule.choice_logits(logits), uniforms, rule.top_k)
        standard = rule.route(logits)[0]
        share = (drawn.unsqueeze(-1) == standard[:, None, None]).any(-1).double().mean()
        assert float(share) > 4 * rule.top_k / is_open
