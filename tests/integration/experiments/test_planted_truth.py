"""Models whose routers are right by construction, and the same models with their router rows permuted.

A reference router that was taught its blocks (``reference+block_loss``) routes by them without any mask. Items are
held-out text of the domains, cut in two: what the models were trained to predict. Nothing is chosen by outcome: the
seeds are the first three, and every threshold is a level, .05 for a single test and .001 for a claim over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest
from torch import Tensor

import moe_interp as mi
from moe_interp.experiments.best_experts import best_experts
from moe_interp.experiments.inputs.items import Item
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.model import ModelConfig
from moe_interp.testbed.strategies.reference import reference_blocks
from moe_interp.testbed.strategies.strategy import recorded
from moe_interp.testbed.training.train import TrainedRun, train

SEEDS, DRAWS = (0, 1, 2), (0, 1)
DOMAINS = ("arithmetic", "facts")
N_EXPERTS, TOP_K, N_LAYERS, PROMPT = 8, 2, 2, 16
BLOCKS = reference_blocks(DOMAINS, N_EXPERTS, TOP_K)  # [domain, expert]
TINY = TestbedConfig(
    model=ModelConfig(n_layers=N_LAYERS, d_model=64, n_experts=N_EXPERTS, top_k=TOP_K, d_expert=48, max_length=128),
    domains=DOMAINS,
    strategy="reference+block_loss",
    data_scale=0.02,
    length=64,
    micro_batch=12,
    steps=100,
    warmup_steps=20,
    validate_every=100,
    checkpoint_every=100,
    validation_sequences=24,
)


@pytest.fixture(scope="module")
def runs() -> list[TrainedRun]:
    return [train(TINY.model_copy(update={"seed": seed}), progress=False) for seed in SEEDS]


@pytest.fixture(scope="module")
def planted(runs: list[TrainedRun]) -> list[mi.IsolationResult]:
    return [isolate(run) for run in runs]


@pytest.fixture(scope="module")
def permuted(runs: list[TrainedRun]) -> list[mi.IsolationResult]:
    """Two permutations of each model's router rows."""
    results = []
    for seed, run in zip(SEEDS, runs):
        for draw in DRAWS:
            orders = [neutral_order(np.random.default_rng([seed, draw, layer])) for layer in range(N_LAYERS)]
            with permuted_rows(run, orders):
                results.append(isolate(run))
    return results


def isolate(run: TrainedRun) -> mi.IsolationResult:
    rows = zip(run.validation.tokens.tolist(), run.validation.domain.tolist())
    items = [
        Item(f"{number:02d}", DOMAINS[domain[0]], tuple(tokens[:PROMPT]), tuple(tokens[PROMPT:]))
        for number, (tokens, domain) in enumerate(rows)
    ]
    return mi.isolate_experts(run.moe, items, baselines=["natural"], mass=["one"], progress=False)


def neutral_order(rng: np.random.Generator) -> Tensor:
    """Rows in random order, half of each block's from the other block: the router tells domains apart, to no use."""
    first, second = rng.permutation(4), 4 + rng.permutation(4)
    mixed = [rng.permutation(np.append(first[half], second[half])) for half in (slice(2), slice(2, 4))]
    return torch.as_tensor(np.concatenate(mixed))


@contextmanager
def permuted_rows(run: TrainedRun, orders: list[Tensor]) -> Iterator[None]:
    """Every layer's router rows in another order: experts no longer get the tokens that they learned from."""
    weights = [run.moe.bridge.original_model.model.layers[layer].mlp.gate.weight for layer in run.moe.layers]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, rows, order in zip(weights, before, orders):
            weight.copy_(rows[order])
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, rows in zip(weights, before):
                weight.copy_(rows)


def agreement(run: TrainedRun) -> list[float]:
    """Share of the slots, by layer, that natural routing gives to the block of the token's domain."""
    tokens, domain = (torch.as_tensor(a, dtype=torch.long) for a in (run.validation.tokens, run.validation.domain))
    with torch.no_grad():
        _, records = recorded(run.moe, lambda: run.moe.bridge(tokens))
    return [float(BLOCKS[domain.unsqueeze(-1), record.indices].float().mean()) for record in records.values()]


def pooled(result: mi.IsolationResult) -> Any:
    return result.calibration_by_domain().set_index("domain").loc["all domains"]


def best_in_block(results: list[mi.IsolationResult]) -> list[bool]:
    """Whether the best expert of each domain and layer is one of the domain's block; by chance a half are."""
    return [
        bool(BLOCKS[number, ids[0]])
        for result in results
        for number, domain in enumerate(DOMAINS)
        for ids in best_experts(result, domain, 1).values()
    ]


def test_the_models_have_learned_and_route_by_the_reference(runs: list[TrainedRun]) -> None:
    for run in runs:
        last = run.history[-1]
        assert all(last["validation"][name] < 0.6 * last["unigram"][name] for name in DOMAINS)
        assert min(agreement(run)) > 0.95  # without any mask


def test_the_reference_router_is_found_calibrated(planted: list[mi.IsolationResult]) -> None:
    for result in planted:
        table = result.calibration_by_domain()
        assert (table["low"] > 0).all()
        assert (table["p"] < 0.05).all()
        assert not table["too_noisy"].any()
        assert table["verdict"].str.startswith("positive correlation").all()
        assert "positive correlation" in result.summary()
        assert "no correlation" not in result.summary()


def test_the_best_experts_are_those_of_the_domains_block(planted: list[mi.IsolationResult]) -> None:
    hits = best_in_block(planted)
    assert binomtest(sum(hits), len(hits), 0.5, alternative="greater").pvalue < 0.001
    for result in planted:
        between = result.domain_effect()
        assert between.attrs["global_p"] < 0.001
        found = between[between["significant"]]
        right = [bool(BLOCKS[DOMAINS.index(d), int(e)]) for d, e in zip(found["best_domain"], found["expert"])]
        assert binomtest(sum(right), len(right), 0.5, alternative="greater").pvalue < 0.05


def test_permuted_router_rows_are_found_uncalibrated_though_the_experts_are_as_good(
    permuted: list[mi.IsolationResult],
) -> None:
    # each is called positive with probability .025: more of them than a level of .001 lets through would be a finding
    limit = binom.ppf(0.999, len(permuted), 0.025)
    positive = [result for result in permuted if pooled(result)["verdict"].startswith("positive correlation")]
    assert len(positive) <= limit < len(permuted) / 2
    beyond_chance = sum(pooled(result)["p"] <= 0.05 for result in permuted)
    assert beyond_chance <= binom.ppf(0.999, len(permuted), 0.05)
    assert sum("no correlation beyond chance" in pooled(result)["verdict"] for result in permuted) >= 4
    hits = best_in_block(permuted)  # the experts did not change, only who is sent to them
    assert binomtest(sum(hits), len(hits), 0.5, alternative="greater").pvalue < 0.001


def test_exchanged_blocks_are_found_to_be_worse_than_chance(
    runs: list[TrainedRun], planted: list[mi.IsolationResult]
) -> None:
    for run, before in zip(runs, planted):
        with permuted_rows(run, [torch.arange(N_EXPERTS).roll(N_EXPERTS // 2)] * N_LAYERS):
            assert max(agreement(run)) < 0.5
            row = pooled(isolate(run))
        assert row["high"] < 0
        assert row["verdict"].startswith("negative correlation")
        assert float(abs(isolate(run).data["delta"] - before.data["delta"]).max()) == 0  # rows put back


def contrasted(run: TrainedRun) -> mi.ContrastResult:
    """Held-out text of one domain against the other's."""
    rows = list(zip(run.validation.tokens.tolist(), run.validation.domain.tolist()))
    a, b = ([tokens for tokens, domain in rows if domain[0] == d] for d in range(2))
    return mi.contrast_experts(run.moe, a, b, progress=False)


def test_the_contrast_of_two_domains_finds_their_blocks(runs: list[TrainedRun]) -> None:
    """Every expert of a block is found, on its own domain's side; with permuted labels nothing is, beside chance."""
    wrong, trials = 0, 0
    for seed, run in enumerate(runs):
        result = contrasted(run)
        for side, block in zip("ab", BLOCKS):
            found = result.found(side)  # type: ignore[arg-type]
            for layer in run.moe.layers:
                assert set(found[layer]) == set(block.nonzero().flatten().tolist()), (seed, side, layer)
        groups = result.data["group"].values
        for draw in range(12):
            shuffled = np.random.default_rng([seed, draw]).permutation(groups)
            order = np.argsort(shuffled, kind="stable")
            relabelled = result.data.isel(prompt=order).assign_coords(group=("prompt", shuffled[order]))
            wrong += bool((mi.ContrastResult(relabelled).experts()["found"] != "").any())
            trials += 1
    assert wrong <= binom.ppf(0.999, trials, 0.05)


def test_suppressing_a_domains_block_hurts_that_domain_beside_random_experts(runs: list[TrainedRun]) -> None:
    """Four of eight experts are a block: the random ones are the other block, so that excess is a double difference."""
    run = runs[0]
    names = {0: DOMAINS[0], 1: DOMAINS[1]}
    held = [
        {"id": str(n), "tokens": tokens, "domain": names[domain[0]]}
        for n, (tokens, domain) in enumerate(zip(run.validation.tokens.tolist(), run.validation.domain.tolist()))
    ]
    effect = mi.steering_effect(run.moe, contrasted(run), held_out=held, random_draws=2, progress=False)
    table = effect.effects().set_index("domain")
    assert table.loc[DOMAINS[0], "excess_verdict"] == "higher"
    assert table.loc[DOMAINS[1], "excess_verdict"] == "lower"
