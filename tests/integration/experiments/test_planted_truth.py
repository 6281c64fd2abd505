"""A model whose router is right by construction, and the same model with its router rows permuted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_interp as mi
from moe_interp.experiments.expert_choice import best_experts
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.model import ModelConfig
from moe_interp.testbed.strategies import reference_blocks
from moe_interp.testbed.strategy import Batch, recorded
from moe_interp.testbed.train import TrainedRun, train

DOMAINS = ("arithmetic", "facts")
N_EXPERTS, TOP_K, N_ITEMS = 8, 2, 24
BLOCKS = reference_blocks(DOMAINS, N_EXPERTS, TOP_K)  # [domain, expert]
TINY = TestbedConfig(
    model=ModelConfig(n_layers=2, d_model=64, n_experts=N_EXPERTS, top_k=TOP_K, d_expert=48, max_length=128),
    domains=DOMAINS,
    strategy="reference",
    data_scale=0.02,
    length=64,
    micro_batch=12,
    steps=160,
    warmup_steps=20,
    validate_every=160,
    checkpoint_every=160,
    validation_sequences=12,
    seed=2,
)
# half of each block changes places with half of the other: the router still tells the domains apart, to no use
SWAPPED = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])


def router(run: TrainedRun, layer: Any) -> Tensor:
    """The weight behind a layer's logits, ``[expert, d_model]``."""
    return run.moe.bridge.original_model.model.layers[layer].mlp.gate.weight


def plant_reference(run: TrainedRun, strength: float = 8.0) -> None:
    """Add to each expert's router row the direction that tells its domain, so that no mask is needed.

    The gate learns a choice within a block only, as the mask hides the other block from it. The direction is the ridge
    regression of the domain (-1, 1) on the router's input, of the masked model.
    """
    tokens = torch.as_tensor(run.validation.tokens, dtype=torch.long)
    domain = torch.as_tensor(run.validation.domain, dtype=torch.long)
    seen: dict[Any, Tensor] = {}

    def keep(layer: Any, value: Tensor, hook: Any) -> None:
        seen[layer] = value

    readers = [(run.moe.hook_name("router_in", layer), partial(keep, layer)) for layer in run.moe.layers]
    with torch.no_grad():
        hooks = run.strategy.fwd_hooks(Batch(tokens, domain, 0, False))
        run.moe.bridge.run_with_hooks(tokens, fwd_hooks=[*readers, *hooks], return_type=None)
        side = BLOCKS[1].float() - BLOCKS[0].float()
        for layer in run.moe.layers:
            x = seen[layer].flatten(0, 1)
            y = 2.0 * domain.flatten().float() - 1
            direction = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y)
            router(run, layer).add_(strength * side[:, None] * direction)


@contextmanager
def permuted_rows(run: TrainedRun, order: Tensor) -> Iterator[None]:
    """Every layer's router rows in another order: experts no longer get the tokens that they learned from."""
    before = {layer: router(run, layer).detach().clone() for layer in run.moe.layers}
    with torch.no_grad():
        for layer, rows in before.items():
            router(run, layer).copy_(rows[order])
        yield
        for layer, rows in before.items():
            router(run, layer).copy_(rows)


def isolate(run: TrainedRun) -> mi.IsolationResult:
    items = [item for domain in run.domains for item in domain.items[:N_ITEMS]]
    return mi.isolate_experts(run.moe, items, baselines=["natural"], mass=["one"], progress=False)


@pytest.fixture(scope="module")
def run() -> TrainedRun:
    trained = train(TINY, progress=False)
    plant_reference(trained)
    return trained


@pytest.fixture(scope="module")
def planted(run: TrainedRun) -> mi.IsolationResult:
    return isolate(run)


def in_block(result: mi.IsolationResult) -> float:
    """Share of each domain's best four experts of a layer that are in its block; by chance a half."""
    hits = [
        BLOCKS[number, experts].float().mean()
        for number, domain in enumerate(DOMAINS)
        for experts in best_experts(result, domain, N_EXPERTS // 2).values()
    ]
    return float(torch.stack(hits).mean())


def pooled(result: mi.IsolationResult) -> Any:
    return result.calibration_by_domain().set_index("domain").loc["all domains"]


def agreement(run: TrainedRun) -> list[float]:
    """Share of the slots, by layer, that natural routing gives to the block of the token's domain."""
    tokens, domain = (torch.as_tensor(a, dtype=torch.long) for a in (run.validation.tokens, run.validation.domain))
    with torch.no_grad():
        _, records = recorded(run.moe, lambda: run.moe.bridge(tokens))
    return [float(BLOCKS[domain.unsqueeze(-1), record.indices].float().mean()) for record in records.values()]


def test_the_model_has_learned_and_routes_by_the_reference(run: TrainedRun) -> None:
    last = run.history[-1]
    assert all(last["validation"][name] < 0.5 * last["unigram"][name] for name in DOMAINS)
    assert min(run.specialization()["agreement"]) == 1.0  # under the mask
    assert min(agreement(run)) > 0.85  # without it


def test_the_reference_router_is_found_calibrated(planted: mi.IsolationResult) -> None:
    table = planted.calibration_by_domain().set_index("domain")
    assert (table["rho"] > 0.5).all()
    assert (table["low"] > 0.3).all()
    assert (table["p"] < 0.05).all()
    assert not table["too_noisy"].any()
    assert table["verdict"].str.startswith("positive correlation").all()
    assert pooled(planted)["p"] < 0.01
    assert "positive correlation" in planted.summary()
    assert "no correlation" not in planted.summary()


def test_the_best_experts_are_those_of_the_domains_block(planted: mi.IsolationResult) -> None:
    assert in_block(planted) >= 0.75
    best = [(BLOCKS[d], ids[0]) for d, name in enumerate(DOMAINS) for ids in best_experts(planted, name, 1).values()]
    assert all(block[expert] for block, expert in best)  # by chance one time in 16
    between = planted.domain_effect()
    assert between.attrs["global_p"] < 0.001
    found = between[between["significant"]]
    right = [bool(BLOCKS[DOMAINS.index(d), int(e)]) for d, e in zip(found["best_domain"], found["expert"])]
    assert len(right) >= 8
    assert sum(right) / len(right) > 0.8


def test_permuted_router_rows_are_found_uncalibrated_though_the_experts_are_as_good(run: TrainedRun) -> None:
    with permuted_rows(run, SWAPPED):
        result = isolate(run)
        assert max(agreement(run)) < 0.7
    table = result.calibration_by_domain()
    assert (table["p"] > 0.05).all()
    assert abs(pooled(result)["rho"]) < 0.35
    assert table["verdict"].str.startswith("no correlation beyond chance").all()
    assert "positive correlation" not in result.summary()
    assert "no correlation beyond chance" in result.summary()
    assert in_block(result) >= 0.75  # the experts did not change, only who is sent to them


def test_exchanged_blocks_are_not_found_calibrated_and_rows_put_back_are(
    run: TrainedRun, planted: mi.IsolationResult
) -> None:
    with permuted_rows(run, torch.arange(N_EXPERTS).roll(N_EXPERTS // 2)):
        result = isolate(run)
        assert max(agreement(run)) < 0.5
    table = result.calibration_by_domain()
    # how negative it gets is no planted fact: with the first layer wrong, other experts may serve the second best
    assert pooled(result)["rho"] < 0
    assert not table["verdict"].str.startswith("positive correlation").any()
    assert float(abs(isolate(run).data["delta"] - planted.data["delta"]).max()) < 1e-4
