"""A model whose circuit is known: its router sends each domain to a block of experts of its own.

A reference router that was taught its blocks (``reference+block_loss``) routes by them without any mask. Sequences are
held-out text of two domains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe_interp as mi
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.model import ModelConfig
from moe_interp.testbed.strategies.reference import reference_blocks
from moe_interp.testbed.training.train import TrainedRun, train

DOMAINS, N, N_POS = ("arithmetic", "facts"), 8, 24
N_EXPERTS, TOP_K = 8, 2
IN_BLOCK = reference_blocks(DOMAINS, N_EXPERTS, TOP_K).numpy()  # [domain, expert]
READS = ("expert_indices", "expert_weights", "expert_out")
TINY = TestbedConfig(
    model=ModelConfig(n_layers=2, d_model=64, n_experts=N_EXPERTS, top_k=TOP_K, d_expert=48, max_length=128),
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
def run() -> TrainedRun:
    return train(TINY, progress=False)


@pytest.fixture(scope="module")
def tokens(run: TrainedRun) -> Tensor:
    """``[domain * sequence, pos]``: so many sequences of each domain."""
    domain = torch.as_tensor(run.validation.domain, dtype=torch.long)[:, 0]
    chosen = torch.cat([(domain == number).nonzero().flatten()[:N] for number in range(len(DOMAINS))])
    return torch.as_tensor(run.validation.tokens, dtype=torch.long)[chosen, :N_POS]


def log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean log-probability of the next tokens, ``[example]``."""
    return logits[:, :-1].log_softmax(dim=-1).gather(-1, targets[:, 1:, None]).squeeze(-1).mean(dim=-1)


def routes_of(moe: mi.MoEHooks, tokens: Tensor, order: Tensor) -> dict[str, Tensor]:
    """A clean cache in which each example has the routes of another."""
    _, cache = moe.bridge.run_with_cache(tokens, names_filter=moe.filter(*READS))
    names = [moe.hook_name(name, layer) for name in READS for layer in moe.layers]
    return {name: cache[name][order] for name in names}


@torch.no_grad()
def test_routes_of_a_wrong_domain_destroy_exactly_that_domain(run: TrainedRun, tokens: Tensor) -> None:
    """Sequences of one domain get the routes of the other, those of the other their own; and both ways round."""
    moe, own = run.moe, torch.arange(2 * N)
    for number in range(len(DOMAINS)):
        mine = slice(number * N, (number + 1) * N)
        wrong, alike = own.clone(), own.clone()
        wrong[mine], alike[mine] = own[mine].add(N).remainder(2 * N), own[mine].roll(1)
        effects = {}
        for name, order in (("wrong", wrong), ("alike", alike)):
            sweep = mi.patching.routes(
                moe, tokens, routes_of(moe, tokens, order), lambda logits: log_prob(logits, tokens), progress=False
            )
            effects[name] = sweep.data["effect"].sum(["layer", "pos"]).values
            others = np.delete(effects[name], np.arange(2 * N)[mine])
            assert (others == 0.0).all()
        # nats a token, summed over single patches: a domain is predicted to 1.7 nats, from 4.5 without context
        assert effects["wrong"][mine].mean() <= -0.3
        assert effects["wrong"][mine].max() < 0.0
        assert effects["wrong"][mine].mean() <= 3 * effects["alike"][mine].mean()


def test_attribution_and_exact_patching_find_the_same_experts_those_of_the_block(
    run: TrainedRun, tokens: Tensor
) -> None:
    """From a text of the other domain to one of its own: the contributions of its block restore the prediction."""
    moe = run.moe
    for number in range(len(DOMAINS)):
        clean, corrupted = tokens.split(N)[number], tokens.split(N)[1 - number]
        metric: Any = lambda logits, clean=clean: log_prob(logits, clean)  # noqa: E731
        found = mi.patching.attribution(moe, clean, corrupted, metric, audit=0, progress=False)
        every = found.agreement(found.data["is_used"].size)  # every cell that is used, exactly
        assert every.n_random + every.n_top >= 200
        assert every.recall >= 0.8
        assert every.spearman >= 0.8
        _, cache = moe.bridge.run_with_cache(clean, names_filter=moe.filter(*READS))
        exact = mi.patching.expert_out(
            moe, corrupted, cache, metric, quantity="contribution", progress=False
        ).mean().values  # fmt: skip
        estimate = found.data["effect"].sum("pos").mean("example").values
        for by_expert in (exact, estimate):
            block, rest = by_expert[:, IN_BLOCK[number]], by_expert[:, ~IN_BLOCK[number]]
            assert (block.min(axis=1) > rest.max(axis=1)).all()  # [layer]
        assert set(np.argsort(-exact.ravel())[:8] % N_EXPERTS) == set(np.flatnonzero(IN_BLOCK[number]))
