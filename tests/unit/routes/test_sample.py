"""Samplers: their law, their count, and that a token's draw is its own."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from moe_interp.errors import ConfigError, DataError
from moe_interp.interventions.random_keys import uniform_keys
from moe_interp.routes.sample import AllSubsets, GumbelTopK, OneSwap, RouteSampler, TokenKeys, UniformSubsets

SAMPLERS = [GumbelTopK(), GumbelTopK(tau=0.3, pool=5), UniformSubsets(), OneSwap(), AllSubsets()]


def logits_of(batch: int = 2, pos: int = 6, n_experts: int = 8, std: float = 1.5, seed: int = 0) -> Tensor:
    return std * torch.randn(batch, pos, n_experts, generator=torch.Generator().manual_seed(seed))


def keys_of(batch: int = 2, pos: int = 6, seed: int = 0, first: int = 0) -> TokenKeys:
    return TokenKeys(seed, 1, first + torch.arange(batch).unsqueeze(1), torch.arange(pos).expand(batch, pos))


def sets_of(routes: Tensor) -> list[frozenset[int]]:
    """The present routes ``[route, slot]`` of one token."""
    return [frozenset(route) for route in routes.tolist() if route[0] >= 0]


def law_of_a_set(logits: list[float], members: tuple[int, ...]) -> float:
    """Plackett-Luce by hand: the probability of drawing these experts without replacement, in any order."""
    odds = [math.exp(x) for x in logits]
    total = 0.0
    for order in permutations(members):
        left, probability = sum(odds), 1.0
        for expert in order:
            probability *= odds[expert] / left
            left -= odds[expert]
        total += probability
    return total


@pytest.mark.parametrize("tau", [0.7, 1.0, 3.0])
def test_draws_follow_the_law_of_draws_without_replacement(tau: float) -> None:
    logits, n = [1.2, 0.4, -0.3, -1.0, 0.0], 20_000
    uniforms = uniform_keys(torch.arange(n), 5, 7).view(1, n, 5)
    drawn = GumbelTopK(tau).draw(torch.tensor([logits]), uniforms, top_k=2)[0]
    sets = list(combinations(range(5), 2))
    counted = [int((drawn.sort(-1).values == torch.tensor(s)).all(-1).sum()) for s in sets]
    expected = [n * law_of_a_set([x / tau for x in logits], s) for s in sets]
    assert sum(expected) == pytest.approx(n)
    assert scipy.stats.chisquare(counted, expected).pvalue > 0.01


def test_a_pool_leaves_the_law_of_its_own_experts() -> None:
    n = 5_000
    uniforms = uniform_keys(torch.arange(n), 4, 3).view(1, n, 4)
    drawn = GumbelTopK(pool=3).draw(torch.tensor([[0.0, 2.0, 1.0, 0.5]]), uniforms, top_k=2)[0]
    assert not bool((drawn == 0).any())
    sets = list(combinations((1, 2, 3), 2))
    counted = [int((drawn.sort(-1).values == torch.tensor(s)).all(-1).sum()) for s in sets]
    expected = [n * law_of_a_set([-math.inf, 2.0, 1.0, 0.5], s) for s in sets]
    assert scipy.stats.chisquare(counted, expected).pvalue > 0.01


def test_first_uniform_routes_are_uniform_over_the_other_subsets() -> None:
    n, standard = 6_000, torch.tensor([0, 3])
    keys = TokenKeys(0, 0, torch.zeros(1, 1, dtype=torch.int64), torch.arange(n).unsqueeze(0))
    sampled = UniformSubsets().sample(torch.randn(1, n, 5), standard.expand(1, n, 2), 1, keys)
    sets = [s for s in combinations(range(5), 2) if s != (0, 3)]
    counted = [int((sampled.indices[0, :, 0].sort(-1).values == torch.tensor(s)).all(-1).sum()) for s in sets]
    assert sum(counted) == n
    assert scipy.stats.chisquare(counted).pvalue > 0.01


def test_temperature_to_zero_gives_the_standard_route() -> None:
    logits = logits_of().flatten(0, 1)
    uniforms = uniform_keys(torch.arange(len(logits)), 10 * 8, 0).view(len(logits), 10, 8)
    drawn = GumbelTopK(tau=1e-6).draw(logits, uniforms, top_k=3)
    assert torch.equal(drawn, logits.topk(3).indices.unsqueeze(1).expand_as(drawn))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("n_routes", [1, 6, 40])
def test_exactly_the_number_asked_for_or_all_there_are(sampler: RouteSampler, n_routes: int) -> None:
    logits = logits_of()
    standard = logits.topk(3).indices
    sampled = sampler.sample(logits, standard, n_routes, keys_of())
    pool = getattr(sampler, "pool", None) or 8
    there_are = 3 * 5 if isinstance(sampler, OneSwap) else math.comb(pool, 3) - 1
    assert sampled.indices.shape == (2, 6, n_routes, 3)
    for b in range(2):
        for t in range(6):
            sets = sets_of(sampled.indices[b, t])
            assert len(sets) == len(set(sets)) == min(n_routes, there_are) == sampled.n_distinct[b, t]
            assert frozenset(standard[b, t].tolist()) not in sets
            assert all(len(s) == 3 for s in sets)
            if isinstance(sampler, OneSwap):
                assert all(len(s & frozenset(standard[b, t].tolist())) == 2 for s in sets)
    assert bool((sampled.is_exhausted == (there_are < n_routes)).all())
    slots = logits.unsqueeze(2).expand(-1, -1, n_routes, -1).gather(-1, sampled.indices.clamp(min=0))
    assert bool((slots.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_token_keeps_its_routes_however_it_is_batched_or_padded(sampler: RouteSampler) -> None:
    logits = logits_of()
    standard = logits.topk(3).indices
    together = sampler.sample(logits, standard, 6, keys_of())
    alone = sampler.sample(logits[1:], standard[1:], 6, keys_of(1, first=1))
    assert torch.equal(together.indices[1:], alone.indices)
    # two columns of padding before the sequence: its tokens keep their positions
    padding = torch.zeros(1, 2, 8)
    keys = TokenKeys(0, 1, torch.tensor([[1]]), torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]]))
    padded = torch.cat([padding, logits[1:]], dim=1)
    shifted = sampler.sample(padded, padded.topk(3).indices, 6, keys)
    assert torch.equal(shifted.indices[:, 2:], alone.indices)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_seed_layer_and_sequence_change_the_draw(sampler: RouteSampler) -> None:
    logits = logits_of()
    standard, keys = logits.topk(3).indices, keys_of()
    first = sampler.sample(logits, standard, 4, keys)
    for other in (
        TokenKeys(1, 1, keys.sequence, keys.position),
        TokenKeys(0, 2, keys.sequence, keys.position),
        TokenKeys(0, 1, keys.sequence + 5, keys.position),
    ):
        assert not torch.equal(sampler.sample(logits, standard, 4, other).indices, first.indices)
    assert torch.equal(sampler.sample(logits, standard, 4, keys).indices, first.indices)


def test_a_router_sure_of_its_choice_is_heated_until_there_are_enough_routes() -> None:
    logits = torch.tensor([[[60.0, 50.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    sampled = GumbelTopK().sample(logits, logits.topk(2).indices, 12, keys_of(1, 2))
    assert sampled.n_distinct.tolist() == [[12, 12]]
    assert float(sampled.temperature_factor[0, 0]) > 1.0
    assert float(sampled.temperature_factor[0, 1]) == 1.0
    assert not bool(sampled.is_exhausted.any())


def test_shut_experts_are_never_drawn() -> None:
    logits = logits_of(n_experts=8)
    logits[..., 4:] = float("-inf")
    sampled = GumbelTopK().sample(logits, logits.topk(2).indices, 9, keys_of())
    assert int(sampled.indices.max()) < 4
    assert sampled.n_distinct.unique().tolist() == [math.comb(4, 2) - 1]
    assert bool(sampled.is_exhausted.all())


@pytest.mark.parametrize("sampler", [GumbelTopK(), UniformSubsets(), OneSwap(), AllSubsets()], ids=repr)
def test_a_route_of_all_experts_has_no_other(sampler: RouteSampler) -> None:
    logits = logits_of(n_experts=4)
    sampled = sampler.sample(logits, logits.topk(4).indices, 5, keys_of())
    assert sampled.n_distinct.unique().tolist() == [0]
    assert bool(sampled.is_exhausted.all() & (sampled.indices == -1).all())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_fewer_routes_are_the_first_of_more(sampler: RouteSampler) -> None:
    logits = logits_of(std=4.0)  # some tokens are heated
    standard = logits.topk(3).indices
    whole = sampler.sample(logits, standard, 12, keys_of())
    for n in (1, 3, 7):
        few = sampler.sample(logits, standard, n, keys_of())
        same = whole.indices[:, :, :n]
        assert torch.equal(few.indices, same) or isinstance(sampler, GumbelTopK)
        # where all there are were wanted, the last are not drawn but filled in
        drawn = ~whole.is_exhausted
        assert torch.equal(few.indices[drawn], same[drawn])
        assert few.share_other is not None
        assert whole.share_other is not None
        assert torch.equal(few.share_other, whole.share_other)


def test_exhausted_tokens_have_their_routes_in_drawn_order() -> None:
    n, standard = 4_000, torch.tensor([0, 1])
    keys = TokenKeys(0, 0, torch.zeros(1, 1, dtype=torch.int64), torch.arange(n).unsqueeze(0))
    logits = torch.tensor([1.2, 0.4, -0.3, -1.0])
    sets = [s for s in combinations(range(4), 2) if s != (0, 1)]
    law = [law_of_a_set(logits.tolist(), s) for s in sets]
    for sampler, odds in ((GumbelTopK(), law), (UniformSubsets(), [1.0] * 5), (AllSubsets(), [1.0] * 5)):
        sampled = sampler.sample(logits.expand(1, n, 4), standard.expand(1, n, 2), 8, keys)
        assert sampled.n_distinct.unique().tolist() == [5]
        first = sampled.indices[0, :, 0].sort(-1).values
        counted = [int((first == torch.tensor(s)).all(-1).sum()) for s in sets]
        assert scipy.stats.chisquare(counted, [n * p / sum(odds) for p in odds]).pvalue > 0.01


def test_the_share_of_other_routes_is_that_of_the_law() -> None:
    n, logits = 4_000, torch.tensor([2.0, 1.0, -0.3, -1.0, 0.0])
    standard = torch.tensor([0, 1])
    keys = TokenKeys(0, 0, torch.zeros(1, 1, dtype=torch.int64), torch.arange(n).unsqueeze(0))
    itself = law_of_a_set(logits.tolist(), (0, 1))
    for sampler, expected in (
        (GumbelTopK(), 1 - itself),
        (UniformSubsets(), 0.9),
        (AllSubsets(), 0.9),
        (OneSwap(), 1.0),
    ):
        share = sampler.sample(logits.expand(1, n, 5), standard.expand(1, n, 2), 3, keys).share_other
        assert share is not None
        assert float(share.mean()) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("tau", [1e-30, 1e-308, 1e-6])
def test_a_tiny_temperature_ends_within_its_pool(tau: float) -> None:
    logits = logits_of(n_experts=16)
    sampled = GumbelTopK(tau, pool=4).sample(logits, logits.topk(2).indices, 4, keys_of())
    assert sampled.n_distinct.unique().tolist() == [4]
    pool = logits.topk(4).indices
    assert bool((sampled.indices.flatten(2).unsqueeze(-1) == pool.unsqueeze(2)).any(-1).all())
    assert bool((sampled.temperature_factor > 1).all())


def test_bad_samplers_are_refused() -> None:
    logits = logits_of()
    standard = logits.topk(3).indices
    wrong: Any
    for wrong in (0, -1.0, math.inf, math.nan, "1", True, None):
        with pytest.raises(ConfigError, match=f"tau={wrong!r} .*a finite tau > 0"):
            GumbelTopK(tau=wrong)
    for wrong in (0, 2.5, "3", True):
        with pytest.raises(ConfigError, match=f"pool={wrong!r}. Expected: .*a whole number of experts"):
            GumbelTopK(pool=wrong)
    for value in (math.nan, math.inf):
        spoilt = logits.clone()
        spoilt[1, 3, 2] = value
        for sampler in (GumbelTopK(), UniformSubsets(), OneSwap(), AllSubsets()):
            with pytest.raises(DataError, match=r"choice logits \[.*\] of token \(1, 3\)\. Expected: finite numbers"):
                sampler.sample(spoilt, standard, 4, keys_of())
    with pytest.raises(ConfigError, match=r"2 experts to draw from.*at least the 3"):
        GumbelTopK(pool=2).sample(logits, standard, 4, keys_of())
    with pytest.raises(ConfigError, match="0 routes a token"):
        UniformSubsets().sample(logits, standard, 0, keys_of())
    with pytest.raises(ConfigError, match=r"all \d+ sets of 8 of 64 experts"):
        AllSubsets().sample(torch.randn(1, 1, 64), torch.arange(8).view(1, 1, 8), 4, keys_of(1, 1))
