"""Tokens of a pass: what is kept counts once, predictions that are read count, and a budget too small is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import moe_interp as mi
from moe_interp.engine import memory
from moe_interp.engine.cpu import matmul
from moe_interp.engine.memory import CPU_TOKENS, tokens_per_pass
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.errors import ConfigError
from moe_interp.routes.plan import Plan
from tests import tiny


@pytest.fixture(scope="module")
def moe() -> mi.MoEHooks:
    return mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))


@pytest.mark.parametrize("is_wide", [False, True])
def test_more_to_hold_leaves_fewer_tokens(moe: mi.MoEHooks, is_wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = 2**23
    monkeypatch.setattr(matmul, "ONEDNN_IS_FASTER", is_wide)
    budget = given * 2 // 3 if is_wide else given  # a third for compiled code
    plain = tokens_per_pass(moe, 10, given)
    vocabulary, width = moe.bridge.cfg.d_vocab, moe.spec(0).d_model
    assert 10 < plain < CPU_TOKENS
    per_token = budget / plain
    # logits and their log-probabilities, 4 bytes each, for every token
    read = tokens_per_pass(moe, 10, given, predictions_per_token=1.0)
    assert read == pytest.approx(budget / (per_token + 8 * vocabulary), rel=0.02)
    # four tensors of the residual's width in each of three layers: for every token, or for the few there are
    every = tokens_per_pass(moe, 10, given, kept_layers=3, kept_tokens=10**9)
    assert every == pytest.approx(budget / (per_token + 48 * width), rel=0.02)
    few = tokens_per_pass(moe, 10, given, kept_layers=3, kept_tokens=20)
    assert few == pytest.approx((budget - 20 * 48 * width) / per_token, rel=0.02)
    assert every < few <= plain


def test_a_budget_without_room_for_one_sequence_names_what_is_needed(moe: mi.MoEHooks) -> None:
    with pytest.raises(ConfigError, match=r"0\.001 MiB.*Expected: at least .* MiB for one sequence of 10 tokens"):
        tokens_per_pass(moe, 10, 1000)


def test_a_budget_of_what_is_free_is_capped_on_a_processor(moe: mi.MoEHooks) -> None:
    assert tokens_per_pass(moe, 10) == CPU_TOKENS
    assert tokens_per_pass(moe, CPU_TOKENS + 1) == CPU_TOKENS + 1  # one sequence is always whole


def test_tokens_and_branches_at_once_follow_what_is_free(moe: mi.MoEHooks, monkeypatch: pytest.MonkeyPatch) -> None:
    base = record_pass(moe, tiny.random_tokens(1, 12), [0])
    found = []
    for free in (2**21, 2**22, 2**40):
        monkeypatch.setattr(
            memory.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free, total=free)
        )
        packed, given = (Plan(base, 0, 32, budget, shares_keys=True) for budget in (None, free // 2))
        assert vars(packed) == vars(given)
        found.append((tokens_per_pass(moe, 10), packed.tokens_at_once, packed.rows_at_once))
        assert found[-1][0] == tokens_per_pass(moe, 10, free // 2)
    assert found[0] < found[1] < found[2]
    assert found[2][0] == CPU_TOKENS
