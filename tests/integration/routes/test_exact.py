"""Branches give what one full forward a route gives, on every family that they serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.hooks.attach import MoEHooks
from moe_interp.routes import GumbelTopK, TokenKeys, branch_scores, plan, score_joint_routes, score_routes
from tests import tiny
from tests.integration.routes.helpers import (
    DECODERS,
    attached,
    largest_difference,
    padded_batch,
    precision,
    random_routes,
    served_layers,
    with_windows,
)

POSITIONS = [4, -2]


def both(moe: MoEHooks, routes: dict[int, Tensor], **options: Any) -> tuple[Any, Tensor]:
    tokens, mask = padded_batch()
    options = {"positions": POSITIONS, "attention_mask": mask, **options}
    branches = score_joint_routes(moe, tokens, routes, method="branch", **options)
    naive = score_joint_routes(moe, tokens, routes, method="naive", **options)
    return branches, naive.logp


@pytest.mark.parametrize("name", DECODERS)
def test_float64(name: str) -> None:
    moe = attached(name, torch.float64)
    with precision(torch.float64):
        for layer in served_layers(name, moe):
            branches, naive = both(moe, {layer: random_routes(moe, layer, padded_batch()[0], n_routes=1)})
            assert largest_difference(branches.logp, naive) <= 1e-10, layer
            assert branches.null_distance <= 1e-10, layer
            assert float((branches.logp - branches.logp_standard.unsqueeze(-1)).abs().nan_to_num().max()) >= 0.05, layer


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gemma4_text", "phimoe"])
def test_float32_under_both_kinds_of_attention(name: str, attention: str) -> None:
    moe = attached(name, attention=attention)
    for layer in moe.layers:
        branches, naive = both(moe, {layer: random_routes(moe, layer, padded_batch()[0])})
        assert largest_difference(branches.logp, naive) <= 2e-5, layer
        assert branches.null_distance <= 2e-5, layer


def test_every_position_of_one_sequence_without_padding() -> None:
    moe, tokens = attached("olmoe"), tiny.random_tokens(1, 10)
    routes = random_routes(moe, 0, tokens, n_routes=3)
    branches = score_routes(moe, tokens, 0, routes, method="branch")
    assert largest_difference(branches, score_routes(moe, tokens, 0, routes, method="naive")) <= 2e-5
    assert bool(branches[:, -1].isnan().all())
    assert not bool(branches[:, :-1].isnan().any())


def test_sliding_windows_shorter_than_the_sequence() -> None:
    moe = attached("mixtral", torch.float64)
    config: Any = moe.bridge.original_model.config
    tokens = tiny.random_tokens(2, 12)
    routes = random_routes(moe, 0, tokens)
    with precision(torch.float64):
        wide = score_routes(moe, tokens, 0, routes, method="branch")
        config.sliding_window = 4
        try:
            branches = score_routes(moe, tokens, 0, routes, method="branch", positions=[3, 9])
            naive = score_routes(moe, tokens, 0, routes, method="naive", positions=[3, 9])
        finally:
            config.sliding_window = None
    assert largest_difference(branches, naive) <= 1e-10
    assert float((branches - wide)[:, 9].abs().max()) >= 1e-3


@pytest.mark.parametrize(
    ("name", "kind", "attention"),
    [
        ("gpt_oss", "sliding_attention", "eager"),
        ("gemma4_text", "sliding_attention", "sdpa"),
        ("llama4", "chunked_attention", "sdpa"),
    ],
)
def test_windows_of_some_of_the_layers_above(name: str, kind: str, attention: str) -> None:
    """One mask for all layers would be wrong by nats: the window is shorter than the sequence, at one layer only."""
    moe = with_windows(name, kind, attention)
    layer = moe.layers[0]
    assert isinstance(layer, int)
    routes = random_routes(moe, layer, padded_batch()[0], n_routes=1)
    with precision(torch.float64):
        branches, naive = both(moe, {layer: routes}, positions=[-2, -3])
    assert largest_difference(branches.logp, naive) <= 1e-10
    assert branches.null_distance <= 1e-10


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "phimoe", "gpt_oss", "jetmoe"])
def test_given_weights(name: str) -> None:
    moe = attached(name, torch.float64)
    tokens, mask = padded_batch()
    layer = moe.layers[0]
    routes = random_routes(moe, layer, tokens)
    weights = torch.rand(routes.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with precision(torch.float64):
        given: dict[str, Any] = {"weights": weights, "positions": POSITIONS, "attention_mask": mask}
        branches = score_routes(moe, tokens, layer, routes, method="branch", **given)
        naive = score_routes(moe, tokens, layer, routes, method="naive", **given)
    assert largest_difference(branches, naive) <= 1e-10


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v2", "llama4", "gemma4_text"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_joint_routes_at_several_layers(name: str, is_weighted: bool) -> None:
    moe = attached(name, torch.float64)
    if is_weighted and moe.spec(moe.layers[0]).weight_on_input:
        pytest.skip("given weights scale the experts' inputs here, which branches refuse")
    tokens, _ = padded_batch()
    routes = {layer: random_routes(moe, layer, tokens, seed=layer) for layer in moe.layers}
    weights = {layer: torch.rand(r.shape, dtype=torch.float64) for layer, r in routes.items()} if is_weighted else None
    with precision(torch.float64):
        branches, naive = both(moe, routes, weights=weights)
    assert largest_difference(branches.logp, naive) <= 1e-10
    assert branches.null_distance <= 1e-10


def test_empty_slots_and_absent_routes() -> None:
    moe, tokens = attached("olmoe", torch.float64), tiny.random_tokens(2, 8)
    routes = random_routes(moe, 1, tokens, n_routes=3)
    routes[:, :, 0, 0] = -1  # one expert fewer, its slot in front
    routes[:, 3, 1] = -1
    with precision(torch.float64):
        branches = score_routes(moe, tokens, 1, routes, method="branch", positions=[2, 3])
        naive = score_routes(moe, tokens, 1, routes, method="naive", positions=[2, 3])
    assert largest_difference(branches, naive) <= 1e-10
    assert bool(branches[:, 3, 1].isnan().all())
    assert not bool(branches[:, 2].isnan().any())


def test_positions_are_counted_in_the_unpadded_sequences() -> None:
    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    routes = random_routes(moe, 1, tokens)
    by_number = score_routes(moe, tokens, 1, routes, positions=[0, -2], attention_mask=mask)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[0, [0, 10]], asked[1, [3, 10]], asked[2, [0, 6]] = True, True, True
    by_mask = score_routes(moe, tokens, 1, routes, positions=asked, attention_mask=mask)
    assert torch.equal(by_number.isnan(), by_mask.isnan())
    assert torch.equal(~by_number.isnan().all(dim=-1), asked)


def test_scores_do_not_depend_on_the_budget() -> None:
    moe, (tokens, mask) = attached("qwen3_moe", torch.float64), padded_batch()
    logits = torch.randn(*tokens.shape, 8, generator=torch.Generator().manual_seed(0))
    keys = TokenKeys(0, 1, torch.arange(3).unsqueeze(1), torch.arange(12).expand(3, 12))
    routes = GumbelTopK().sample(logits, logits.topk(2).indices, 20, keys).indices
    with precision(torch.float64):
        given: dict[str, Any] = {"attention_mask": mask, "method": "branch"}
        roomy = score_routes(moe, tokens, 1, routes, **given)
        tight = score_routes(moe, tokens, 1, routes, memory_budget=4_000_000, **given)
    assert largest_difference(roomy, tight) <= 1e-12


@pytest.mark.parametrize("name", ["olmoe", "granite_moe", "laguna"])
def test_many_routes_at_the_last_layer_share_their_unembeddings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, (tokens, mask) = attached(name, torch.float64), padded_batch()
    routes = random_routes(moe, moe.layers[-1], tokens, n_routes=60)
    routes[:, 4, 3] = -1
    given: dict[str, Any] = {"attention_mask": mask, "positions": POSITIONS, "method": "branch"}
    spanned, calls = branch_scores.spanned_logits, []

    def counted(*args: Any) -> Tensor | None:
        calls.append(spanned(*args))
        return calls[-1]

    with precision(torch.float64):
        monkeypatch.setattr(branch_scores, "spanned_logits", counted)
        shared = score_routes(moe, tokens, moe.layers[-1], routes, **given)
        monkeypatch.setattr(plan, "is_cheaper", lambda *args: False)
        single = score_routes(moe, tokens, moe.layers[-1], routes, **given)
    # a scale follows the unembedding of granite, so its logits are not what the unembedding gives
    assert [logits is None for logits in calls] == ([] if name == "granite_moe" else [False])
    assert largest_difference(shared, single) <= 1e-10


def test_bfloat16_stays_within_its_own_noise() -> None:
    moe, tokens = attached("olmoe", torch.bfloat16), tiny.random_tokens(2, 10)
    routes = random_routes(moe, 0, tokens)
    branches = score_joint_routes(moe, tokens, {0: routes}, method="branch")
    naive = score_routes(moe, tokens, 0, routes, method="naive")
    assert branches.logp.dtype == torch.float32
    assert float((branches.logp - naive).abs().nanmedian()) <= 0.03
