"""Attention over shared keys: what it serves, what it refuses, and the numbers of rows with copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from moe_interp.arch.modules import unwrap
from moe_interp.engine import branch_attention, policy
from moe_interp.engine.branch_attention import NAME, UnknownAttention
from moe_interp.engine.branches import BranchRunner, can_share_keys
from moe_interp.engine.grid.trial import can_run_grid
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.routes import branch_scores, plan, score_joint_routes, score_routes
from tests import tiny
from tests.integration.routes.helpers import (
    DECODERS,
    attached,
    largest_difference,
    padded_batch,
    precision,
    random_routes,
    served_layers,
)

WITH_COPIES = {"jetmoe", "nemotron_h"}  # keys repeated behind the cache; attention that is a mixer among others
SERVED = [name for name in DECODERS if served_layers(name, attached(name))]


def scored(moe: MoEHooks, layer: int, routes: Tensor, **options: Any) -> Any:
    tokens, mask = padded_batch()
    return score_joint_routes(moe, tokens, {layer: routes}, attention_mask=mask, method="branch", **options)


@pytest.mark.parametrize("name", SERVED)
def test_both_ways_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached(name, torch.float64)
    tokens, mask = padded_batch()
    layer = served_layers(name, moe)[0]
    routes = random_routes(moe, layer, tokens)
    with precision(torch.float64):
        assert can_share_keys(record_pass(moe, tokens, [layer], mask)) == (name not in WITH_COPIES)
        shared = scored(moe, layer, routes)
        monkeypatch.setattr(branch_scores, "can_share_keys", lambda base: False)
        copied = scored(moe, layer, routes)
    assert largest_difference(shared.logp, copied.logp) <= 1e-10
    assert copied.null_distance <= 1e-10


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "deepseek_v3"])
def test_pieces_of_any_size_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, and as many as there are: sinks, groups of heads, and values narrower than keys."""
    moe = attached(name, torch.float64)
    tokens, _ = padded_batch()
    routes = random_routes(moe, moe.layers[0], tokens, n_routes=6)
    found = []
    monkeypatch.setattr(plan, "ROW_LENGTH", 4)
    with precision(torch.float64):
        for scores in (1, 500, 10**9):
            monkeypatch.setattr(policy, "AT_ONCE", {"cpu": policy.AtOnce(1536, 2**24, scores)})
            found.append(scored(moe, moe.layers[0], routes).logp)
    assert largest_difference(found[0], found[2]) <= 1e-12
    assert largest_difference(found[1], found[2]) <= 1e-12


def test_scores_far_apart() -> None:
    """Nearly all of a token's attention on one key: the shares of the others are smaller than any number."""
    hf = tiny.build_hf("mixtral", dtype=torch.float32)
    with torch.no_grad():
        for block in hf.model.layers:
            block.self_attn.q_proj.weight.mul_(300.0)
    moe = attach(tiny.build_bridge(hf, "mixtral"))
    tokens, mask = padded_batch()
    base = record_pass(moe, tokens, [0], mask)
    assert can_share_keys(base)
    routes = random_routes(moe, 0, tokens)
    branches = score_routes(moe, tokens, 0, routes, [5, -2], attention_mask=mask, method="branch")
    naive = score_routes(moe, tokens, 0, routes, [5, -2], attention_mask=mask, method="naive")
    assert largest_difference(branches, naive) <= 1e-4
    assert not bool(branches[0, 5].isnan().any())


def test_half_precision_keeps_the_base_pass_s_own_steps() -> None:
    moe = attached("olmoe", torch.bfloat16)
    assert not can_share_keys(record_pass(moe, padded_batch()[0], [0], padded_batch()[1]))


@pytest.mark.parametrize("fault", ["scale", "own", "soft-cap", "shape", "first", "attribute", "key"])
def test_an_attention_that_comes_out_otherwise_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if fault == "scale":
            options["scaling"] = 2 * options["scaling"]
        if fault == "own":
            value = value * 0.5
        if fault == "soft-cap":
            options["softcap"] = 30.0
        if fault == "shape":
            key = key[..., :-1]
        if fault == "attribute":  # as an attention that reads a mask which is not there
            return mask.of_no_such_name
        if fault == "key":
            return options["of_no_such_name"]
        out, pattern = branch_attention.branch_attention(module, query, key, value, mask, **options)
        if fault == "first":
            out = out * torch.where(mask.rows.position == 0, 1.5, 1.0)[..., None, None]
        return out, pattern

    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    routes = random_routes(moe, 0, tokens)
    expected = scored(moe, 0, routes).logp
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, faulty)
    assert not can_share_keys(record_pass(moe, tokens, [0], mask))
    assert largest_difference(scored(moe, 0, routes).logp, expected) <= 2e-5


def test_the_attention_of_no_branch_says_so() -> None:
    one = torch.zeros(1, 1, 1, 4)
    with pytest.raises(UnknownAttention):
        branch_attention.branch_attention(None, one, one, one, None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_gives_the_model_its_attention_back(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    base = record_pass(moe, tokens, [0], mask)
    assert can_share_keys(base)
    attention: Any = unwrap(moe.bridge.blocks[1].attn)
    config = attention.config

    def fail(*args: Any) -> Tensor:
        assert attention.config._attn_implementation == NAME
        assert config._attn_implementation == "eager"
        raise error

    monkeypatch.setattr(branch_attention, "_attend", fail)
    position = torch.tensor([[3]])
    with pytest.raises(error), BranchRunner(base, 0) as run:
        run(torch.tensor([0]), position, base.block_out(0)[position])
    assert attention.config is config
    assert "forward" not in moe.bridge.blocks[1].attn.__dict__


def test_another_model_of_the_same_config_is_not_touched() -> None:
    """transformers keeps the config object that it is given, so two models may have one."""
    hf = tiny.build_hf("olmoe", dtype=torch.float32)
    other = type(hf)(hf.config).eval()
    moe, (tokens, mask) = attach(tiny.build_bridge(hf, "olmoe")), padded_batch()
    base = record_pass(moe, tokens, [0], mask)
    assert can_share_keys(base)
    configs: list[Any] = [unwrap(block.attn).config for block in moe.bridge.blocks]
    with torch.no_grad():
        before = other(input_ids=tokens, attention_mask=mask).logits
        with BranchRunner(base, 0):
            assert torch.equal(other(input_ids=tokens, attention_mask=mask).logits, before)
    runs = [
        BranchRunner(base, 0),
        BranchRunner(record_pass(attach(tiny.build_bridge(other, "olmoe")), tokens, [0], mask), 0),
    ]
    for run in runs:
        run.__enter__()
    for run in runs:
        run.__exit__()
    assert hf.config._attn_implementation == "eager"
    assert [unwrap(block.attn).config for block in moe.bridge.blocks] == configs
    assert all(config._attn_implementation == "eager" for config in configs)


def test_few_branches_are_not_worth_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch_scores, "_WORTH_A_TRIAL", 50)
    tried: list[int] = []
    monkeypatch.setattr(branch_scores, "can_share_keys", lambda base: bool(tried.append(1)) or True)
    moe, tokens = attached("olmoe"), tiny.random_tokens(1, 10)
    score_routes(moe, tokens, 0, random_routes(moe, 0, tokens, n_routes=4), [3], method="branch")
    assert not tried
    score_routes(moe, tokens, 0, random_routes(moe, 0, tokens, n_routes=6), method="branch")
    assert tried


def test_a_mask_that_only_says_what_is_earlier_is_left_out() -> None:
    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    padded = record_pass(moe, tokens, [0], mask)
    right = record_pass(moe, tokens[[0, 2]], [0], mask[[0, 2]])
    hides = [base.hides_keys(base.arguments.numbers[1]["attention_mask"]) for base in (padded, right)]
    assert hides == [True, False]  # padding on the left is hidden, on the right nothing real reads it


@pytest.mark.parametrize(("dtype", "fault"), [(torch.float32, 1e-2), (torch.float64, 1e-4)])
@pytest.mark.parametrize("tried", [can_share_keys, can_run_grid])
def test_an_attention_that_is_off_by_little_is_not_used_either(
    dtype: torch.dtype, fault: float, tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By less than a thousand times what rounding explains: both trials notice it."""

    def faulty(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        return branch_attention.branch_attention(module, query, key, value * (1 + fault), mask, **options)

    moe, (tokens, mask) = attached("olmoe", dtype), padded_batch()
    with precision(dtype):
        base = record_pass(moe, tokens, [0], mask)
        assert tried(base)
        monkeypatch.setitem(AttentionInterface._global_mapping, NAME, faulty)
        assert not tried(record_pass(moe, tokens, [0], mask))
