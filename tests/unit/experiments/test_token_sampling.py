"""The law of the next token, against its probabilities; seeds and draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from moe_interp.errors import DataError
from moe_interp.experiments.pass_at_k.token_sampling import draws, next_tokens, sample_seed

N = 20_000


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    """The probabilities, by a loop over the tokens from the likeliest on."""
    p = (logits.double() / temperature).softmax(-1).numpy()
    kept, reached = np.zeros_like(p), 0.0
    for token in np.argsort(-p, kind="stable"):
        kept[token] = p[token]
        reached += p[token]
        if reached >= top_p:
            break
    return kept / kept.sum()


def drawn(logits: torch.Tensor, temperature: float, top_p: float, seed: int = 0) -> np.ndarray:
    seeds = torch.tensor([sample_seed(seed, "p", s) for s in range(N)])
    rows = logits.expand(N, -1)
    tokens = next_tokens(rows, draws(seeds, 0, 1)[:, 0], temperature, top_p)
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1])


@pytest.mark.parametrize("width", [7, 600])
@pytest.mark.parametrize("temperature, top_p", [(0.6, 0.95), (1.0, 1.0), (1.7, 0.8), (5.0, 0.99), (1.0, 1e-9)])
def test_tokens_have_the_law_of_the_nucleus(width: int, temperature: float, top_p: float) -> None:
    logits = 2 * torch.randn(width, generator=torch.Generator().manual_seed(width))
    wanted, counts = nucleus(logits, temperature, top_p), drawn(logits, temperature, top_p)
    assert not counts[wanted == 0].any()
    # tokens that are expected less than ten times count together
    few = wanted * N < 10
    observed = np.append(counts[~few], counts[few].sum())
    expected = np.append(wanted[~few], wanted[few].sum()) * N
    if len(observed[expected > 0]) > 1:
        assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-4


def test_all_that_ties_with_the_last_token_of_the_nucleus_is_in_it() -> None:
    counts = drawn(torch.tensor([0.0, 1.0, 0.0, -9.0]), 1.0, 0.7)
    assert (counts > 0).tolist() == [True, True, True, False]
    assert counts[1] / N == pytest.approx(np.e / (np.e + 2), abs=0.01)


def test_temperature_0_takes_the_first_of_the_likeliest_and_low_temperatures_do_not_overflow() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5e3, 1.0, -torch.inf]])
    u = torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert next_tokens(logits, u, 0.0, 0.95).tolist() == [1, 0]
    for temperature in (1e-30, 1e-46, 5e-324):  # float32 has none below 1e-45
        assert next_tokens(logits, u, temperature, 0.95).tolist() == [1, 0]
    half = torch.tensor([[6e4, 0.0, -torch.inf]], dtype=torch.float16)
    assert next_tokens(half, u[:1], 1e-3, 1.0).tolist() == [0]


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("u", [1e-16, 0.5, 1 - 1e-16])
def test_extreme_draws_stay_within_the_nucleus(u: float, top_p: float) -> None:
    logits = torch.full((1, 400), -torch.inf)
    logits[0, [3, 7]] = torch.tensor([0.0, 0.5])
    token = int(next_tokens(logits, torch.tensor([u], dtype=torch.float64), 1.0, top_p))
    assert token in (3, 7)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(temperature: float, bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(DataError, match="place 1: logits that are not finite"):
        next_tokens(logits, torch.rand(3).double(), temperature, 0.9, "place {}".format)
    with pytest.raises(DataError, match="not finite"):
        next_tokens(torch.full((1, 4), -torch.inf), torch.rand(1).double(), temperature, 0.9)


def test_draws_belong_to_seed_and_token() -> None:
    seeds = torch.tensor([sample_seed(0, "p", s) for s in range(500)])
    whole = draws(seeds, 0, 40)
    assert torch.equal(draws(seeds[7:8], 5, 3), whole[7:8, 5:8])
    assert ((whole > 0) & (whole < 1)).all()
    counts = np.histogram(whole.numpy(), bins=20, range=(0, 1))[0]
    assert chisquare(counts).pvalue > 1e-4
    # neither neighbouring tokens nor neighbouring samples go together
    assert abs(np.corrcoef(whole[:, :-1].flatten(), whole[:, 1:].flatten())[0, 1]) < 0.03
    assert abs(np.corrcoef(whole[:-1].flatten(), whole[1:].flatten())[0, 1]) < 0.03


def test_seeds_tell_run_problem_and_sample_apart() -> None:
    seeds = {sample_seed(seed, problem, s) for seed in (0, 1, -1) for problem in ("a", "b", "1") for s in range(50)}
    assert len(seeds) == 450
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, "a", 1) == sample_seed(0, "a", 1)
