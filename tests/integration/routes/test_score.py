"""What ``score_routes`` refuses, where it falls back to full forwards, and that it leaves the model as it was."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_interp.engine import policy
from moe_interp.engine.branches import BranchRunner
from moe_interp.engine.memory import Memory
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.errors import ConfigError, DataError, HookError, RouteError
from moe_interp.hooks.attach import attach
from moe_interp.routes import (
    SlowRoutesWarning,
    branch_scores,
    check_routes,
    score_from_base,
    score_joint_routes,
    score_routes,
    screen_routes,
)
from moe_interp.routes.grid_scores import exact_scores
from moe_interp.routes.inputs import decoder_layers, scorable
from tests import tiny
from tests.integration.routes.helpers import attached, largest_difference, random_routes, served_layers

TOKENS = tiny.random_tokens(2, 8)


@pytest.mark.parametrize("name", ["deepseek_v4", "glm_moe_dsa", "jamba", "lfm2_moe"])
def test_families_that_branches_cannot_serve_fall_back_and_say_so_once(name: str) -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf(name), name))
    layer = next(n for n in moe.layers if n not in served_layers(name, moe))
    routes = random_routes(moe, layer, TOKENS)  # type: ignore[arg-type]
    with pytest.warns(SlowRoutesWarning, match="one full forward each"):
        auto = score_routes(moe, TOKENS, layer, routes, positions=[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = score_routes(moe, TOKENS, layer, routes, positions=[3])
    naive = score_routes(moe, TOKENS, layer, routes, positions=[3], method="naive")
    assert largest_difference(auto, naive) == largest_difference(again, naive) == 0.0
    with pytest.raises(ConfigError, match=r'method="branch".*Use "auto"'):
        score_routes(moe, TOKENS, layer, routes, method="branch")


def test_other_hooks_on_the_bridge_make_it_slow_and_count() -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    routes = random_routes(moe, 1, TOKENS)
    free = score_routes(moe, TOKENS, 1, routes, positions=[3])

    def fade(value: Tensor, hook: Any) -> Tensor:
        return value * torch.linspace(0.0, 1.0, value.shape[-1])

    with moe.bridge.hooks(fwd_hooks=[("blocks.1.hook_out", fade)]), pytest.warns(SlowRoutesWarning, match="hooks"):
        hooked = score_routes(moe, TOKENS, 1, routes, positions=[3])
    assert float((free - hooked)[:, 3].abs().min()) > 1e-4


def test_given_weights_that_scale_inputs_are_scored_slowly() -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("llama4"), "llama4"))
    routes = random_routes(moe, 1, TOKENS)
    weights = torch.full(routes.shape, 0.7)
    with pytest.warns(SlowRoutesWarning, match="scale the experts' inputs"):
        auto = score_routes(moe, TOKENS, 1, routes, positions=[2], weights=weights)
    naive = score_routes(moe, TOKENS, 1, routes, positions=[2], weights=weights, method="naive")
    assert largest_difference(auto, naive) == 0.0


def test_a_null_route_that_misses_the_plain_forward_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    routes, run = random_routes(moe, 0, TOKENS), BranchRunner.__call__
    naive = score_routes(moe, TOKENS, 0, routes, positions=[3, 5], method="naive")

    def misplaced(self: BranchRunner, sequence: Tensor, position: Tensor, *others: Any) -> Tensor:
        return run(self, sequence, (position - 1).clamp(min=1), *others)

    monkeypatch.setattr(BranchRunner, "__call__", misplaced)
    with pytest.warns(SlowRoutesWarning, match="standard route"):
        auto = score_routes(moe, TOKENS, 0, routes, positions=[3, 5])
    assert largest_difference(auto, naive) == 0.0


def state_of(bridge: nn.Module) -> dict[str, Any]:
    modules = dict(bridge.named_modules())
    return {
        "forwards": {name: m.__dict__["forward"] for name, m in modules.items() if "forward" in m.__dict__},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
        "children": list(modules),
    }


def test_the_model_is_left_as_it_was_also_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("gemma4_text"), "gemma4_text"))
    with torch.no_grad():
        before = moe.bridge(TOKENS)  # wires TransformerLens' own capture hooks
    state, routes = state_of(moe.bridge), random_routes(moe, 0, TOKENS)
    score_routes(moe, TOKENS, 0, routes)
    assert state_of(moe.bridge) == state
    last = moe.bridge.blocks[-1]
    with monkeypatch.context() as patch:
        patch.setattr("moe_interp.routes.branch_scores.log_probs", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score_routes(moe, TOKENS, 0, routes)
    assert state_of(moe.bridge) == state

    def fail(value: Tensor, hook: Any) -> Tensor:
        raise RuntimeError("inside the model")

    with moe.bridge.hooks(fwd_hooks=[(last.hook_out.name, fail)]), pytest.raises(RuntimeError, match="inside"):
        record_pass(moe, TOKENS, [0])
    assert state_of(moe.bridge) == state
    with torch.no_grad():
        assert torch.equal(moe.bridge(TOKENS), before)


def test_one_base_pass_serves_several_layers_and_targets() -> None:
    moe = attached("olmoe")
    base = record_pass(moe, TOKENS, [0, 2])
    given = {layer: check_routes(base, layer, random_routes(moe, layer, TOKENS)) for layer in (0, 2)}
    targets = torch.stack([TOKENS.roll(-1, dims=1), (TOKENS + 1) % 90], dim=-1)
    for layer, routes in given.items():
        several = score_from_base(base, {layer: routes}, targets=targets)
        single = score_joint_routes(moe, TOKENS, {layer: routes.indices})
        assert several.logp.shape == (2, 8, 2, 2)
        assert largest_difference(several.logp[..., 0], single.logp) <= 1e-6
        assert largest_difference(several.logp_standard[..., 0], single.logp_standard) == 0.0
        assert float((several.logp[..., 0] - several.logp[..., 1]).abs().nan_to_num().max()) > 0.1
        policy = torch.log_softmax(base.router_logits[layer], dim=-1)
        by_hand = policy[0, 3, routes.indices[0, 3, 1]].sum()
        assert torch.allclose(several.router_logp[0, 3, 1], by_hand)


def test_the_naive_way_is_a_hook_on_one_token() -> None:
    """The reference itself, against an independent hook written by hand."""
    moe = attached("olmoe")
    routes = random_routes(moe, 1, TOKENS)
    naive = score_routes(moe, TOKENS, 1, routes, method="naive", positions=[4])

    def swap(value: Tensor, hook: Any) -> Tensor:
        value[0, 4] = routes[0, 4, 1]
        return value

    with torch.no_grad():
        logits = moe.bridge.run_with_hooks(TOKENS[:1], fwd_hooks=[(moe.hook_name("expert_indices", 1), swap)])
    assert float(logits[0, 4].log_softmax(-1)[TOKENS[0, 5]]) == pytest.approx(float(naive[0, 4, 1]), abs=1e-6)


BAD_ROUTES = [
    (lambda r: r[..., :1], RouteError, "equal number of experts"),
    (lambda r: torch.cat([r[..., :1], r[..., :1]], dim=-1), RouteError, "twice in the route"),
    (lambda r: r + 8, RouteError, "ids from 0 to 7"),
    (lambda r: r[..., :1], RouteError, r"routes of shape \(2, 8, 2, 1\).*Fill routes of fewer experts with -1"),
    (lambda r: torch.cat([r, r], dim=-1), RouteError, "Leave experts out: a token of this layer uses 2"),
    (lambda r: r.float(), RouteError, "float32.*Pass expert ids as integers"),
    (lambda r: r[:, :-1], RouteError, r"integers of shape \[2, 8, route, 2\].*Give routes at every position"),
    (lambda r: r[:, :, 0], RouteError, r"one route a token as routes\.unsqueeze\(2\)"),
    (lambda r: r[0, 0], RouteError, "Give each token of each sequence its own routes"),
    (lambda r: r.index_fill(2, torch.tensor(1), 9), RouteError, "layer 1, sequence 0, position 0, route 1"),
    (lambda r: None, RouteError, "routes of type NoneType that make no tensor"),
    (lambda r: [[1], [2, 3]], RouteError, "routes of type list that make no tensor"),
    (lambda r: r[:, :, :0], DataError, "no route to score"),
]


@pytest.mark.parametrize("spoil, error, message", BAD_ROUTES)
def test_bad_routes(spoil: Any, error: type[Exception], message: str) -> None:
    moe = attached("olmoe")
    with pytest.raises(error, match=message):
        score_routes(moe, TOKENS, 1, spoil(random_routes(moe, 1, TOKENS)))


@pytest.mark.parametrize("positions", [3, [[1, 2], [3, 4]], [0.5], [True] * 8, torch.ones(2, 7, dtype=torch.bool)])
def test_bad_positions(positions: Any) -> None:
    moe = attached("olmoe")
    with pytest.raises(DataError, match=r"positions of shape .*a list of integers, or bool of shape \(2, 8\)"):
        score_routes(moe, TOKENS, 1, random_routes(moe, 1, TOKENS), positions=positions)


@pytest.mark.parametrize("positions", ["all", "3", {1: 2}])
def test_positions_as_a_word(positions: Any) -> None:
    moe = attached("olmoe")
    with pytest.raises(DataError, match=r"positions=.*Leave positions out to score every token"):
        score_routes(moe, TOKENS, 1, random_routes(moe, 1, TOKENS), positions=positions)


def test_positions_that_no_sequence_has() -> None:
    moe = attached("olmoe")
    routes, mask = random_routes(moe, 1, TOKENS), torch.ones_like(TOKENS)
    mask[1, 5:] = 0
    for bad in ([3, 999], [3, 8], [3, -9]):
        with pytest.raises(DataError, match=rf"positions \[{bad[1]}\], which no sequence has.*from -8 to 7"):
            score_routes(moe, TOKENS, 1, routes, positions=bad, attention_mask=mask)
    scores = score_routes(moe, TOKENS, 1, routes, positions=[3, 6], attention_mask=mask)
    assert scores.isfinite()[..., 0].nonzero().tolist() == [[0, 3], [0, 6], [1, 3]]  # one sequence is long enough


def test_one_sequence_without_its_batch_axis() -> None:
    moe = attached("olmoe")
    routes = random_routes(moe, 1, TOKENS[:1])
    with pytest.raises(RouteError, match=r"routes\.unsqueeze\(0\)"):
        score_routes(moe, TOKENS[0], 1, routes[0])


@pytest.mark.parametrize("budget", ["1GiB", float("nan"), float("inf"), True, 0, -1.0])
def test_a_memory_budget_that_is_no_number(budget: Any) -> None:
    moe = attached("olmoe")
    with pytest.raises(ConfigError, match=r"memory_budget=.*a number of bytes"):
        score_routes(moe, TOKENS, 1, random_routes(moe, 1, TOKENS), memory_budget=budget)


def test_layers_are_one_or_several_of_any_kind() -> None:
    moe = attached("olmoe")
    for given in (1, np.int64(1), np.array(1), torch.tensor(1), "1", [1], np.array([1, 1]), torch.tensor([-2]), {1}):
        assert decoder_layers(moe, given) == (1,)
    assert decoder_layers(moe) == decoder_layers(moe, range(3)) == decoder_layers(moe, np.array([2, 0, 1])) == (0, 1, 2)
    assert all(type(layer) is int for layer in decoder_layers(moe, np.array([2, 0, 1])))
    for bad in ([9], "0,1", 1.0, True, [None]):
        with pytest.raises(HookError, match="does not exist"):
            decoder_layers(moe, bad)
    with pytest.raises(ConfigError, match=r"no layers.*at least one of \[0, 1, 2\]"):
        decoder_layers(moe, [])
    routes = random_routes(moe, 1, TOKENS)
    assert largest_difference(score_routes(moe, TOKENS, np.int64(1), routes), score_routes(moe, TOKENS, 1, routes)) == 0


def test_texts_score_as_the_ids_they_become() -> None:
    tokenizer = tiny.tiny_tokenizer()
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tokenizer))
    texts = ["w3 w4 w5", "w6 w7 w8 w9 w10", "w11 <eos> <pad> w12"]
    ids = moe.bridge.to_tokens(texts)
    routes = random_routes(moe, 1, ids)
    for side in ("left", "right"):
        moe.bridge.tokenizer.padding_side = side
        ids, lengths = moe.bridge.to_tokens(texts), [4, 6, 5]
        mask = torch.stack([(torch.arange(6) < n) if side == "right" else (torch.arange(6) >= 6 - n) for n in lengths])
        scores = score_routes(moe, texts, 1, routes)
        assert torch.equal(scores.isfinite()[..., 0].sum(-1), torch.tensor(lengths) - 1)  # the text's own <pad> counts
        assert largest_difference(scores, score_routes(moe, ids, 1, routes, attention_mask=mask)) <= 1e-6
        one = score_routes(moe, texts[0], 1, routes[:1, -4:] if side == "left" else routes[:1, :4])
        assert largest_difference(one, scores[:1, -4:] if side == "left" else scores[:1, :4]) <= 1e-5
    kept = screen_routes(moe, texts, [1], {1: routes}, keep=2)[1].logp  # type: ignore[arg-type]
    assert largest_difference(kept, scores) <= 1e-5
    for given, mask_given in ((texts, mask), (["w3", 4], None)):
        with pytest.raises(DataError, match="texts with an attention mask, or among other things"):
            score_routes(moe, given, 1, routes, attention_mask=mask_given)  # type: ignore[arg-type]


def test_bad_joint_routes() -> None:
    moe = attached("olmoe")
    routes = random_routes(moe, 1, TOKENS)
    with pytest.raises(RouteError, match=r"0: \(2, 8, 2\), 1: \(2, 8, 1\).*the same numbers at all"):
        score_joint_routes(moe, TOKENS, {0: routes, 1: routes[:, :, :1]})
    with pytest.raises(RouteError, match=r"layers \[-1, 2\]\. Expected: each layer once"):
        score_joint_routes(moe, TOKENS, {-1: routes, 2: routes})
    with pytest.raises(RouteError, match=r"weights at layers \[1\]"):
        score_joint_routes(moe, TOKENS, {0: routes}, weights={1: torch.ones(routes.shape)})
    with pytest.raises(RouteError, match="at least one layer"):
        score_joint_routes(moe, TOKENS, {})
    with pytest.raises(RouteError, match=r"a Tensor in place of routes by layer.*Pass \{layer: routes\}"):
        score_joint_routes(moe, TOKENS, routes)  # type: ignore[arg-type]


def test_layers_and_numbers_of_any_kind_mean_the_same() -> None:
    moe = attached("olmoe")
    routes, weights = random_routes(moe, 2, TOKENS), torch.full((2, 8, 2, 2), 0.3)
    plain = score_joint_routes(moe, TOKENS, {2: routes}, weights={2: weights}).logp
    last = score_joint_routes(moe, TOKENS, {-1: routes.to(torch.int8)}, weights={2: weights}).logp
    listed = score_routes(moe, TOKENS.int(), 2, routes, weights=weights, attention_mask=torch.ones(2, 8).tolist())  # type: ignore[arg-type]
    assert largest_difference(plain, last) == largest_difference(plain, listed) == 0.0
    assert float((plain - score_routes(moe, TOKENS, 2, routes)).abs().nan_to_num().max()) > 0.01


def test_attention_without_a_mask_of_each_tokens_own_is_slow_but_at_the_last_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moe = attached("olmoe")
    base = record_pass(moe, TOKENS, [0, 2])
    monkeypatch.setattr(moe.bridge.original_model.config, "_attn_implementation_internal", "flash_attention_2")
    assert base.refusal(0) == "attention 'flash_attention_2', which takes no mask of each token's own"
    assert base.refusal(2) is None


def test_bad_weights() -> None:
    moe = attached("olmoe")
    routes = random_routes(moe, 1, TOKENS)
    with pytest.raises(RouteError, match="a finite weight for each slot"):
        score_routes(moe, TOKENS, 1, routes, weights=torch.ones(2, 8, 2, 1))
    with pytest.raises(RouteError, match="not finite"):
        score_routes(moe, TOKENS, 1, routes, weights=torch.full(routes.shape, float("nan")))


def test_bad_layers() -> None:
    moe = attached("qwen3_moe")
    with pytest.raises(HookError, match="dense"):
        score_routes(moe, TOKENS, 0, random_routes(moe, 1, TOKENS))
    encoder_decoder = attach(tiny.build_bridge(tiny.build_hf("switch_transformers"), "switch_transformers"))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        score_routes(encoder_decoder, TOKENS, 0, torch.zeros(2, 8, 1, 1, dtype=torch.int64))


def test_bad_sequences() -> None:
    moe = attached("olmoe")
    long = tiny.random_tokens(1, 65)
    with pytest.raises(DataError, match=r"the sequence: 65 tokens.*the model's context of 64"):
        score_routes(moe, long, 1, random_routes(moe, 1, long))
    with pytest.raises(DataError, match="no token to score"):
        score_routes(moe, TOKENS[:, :1], 1, random_routes(moe, 1, TOKENS[:, :1]))
    with pytest.raises(DataError, match="no token to score"):
        score_routes(moe, TOKENS, 1, random_routes(moe, 1, TOKENS), positions=[7])
    with pytest.raises(DataError, match="mask of shape"):
        score_routes(moe, TOKENS, 1, random_routes(moe, 1, TOKENS), attention_mask=torch.ones(2, 7))
    with pytest.raises(DataError, match=r"token id 101 of sequence 1, position 4\. Expected: ids from 0 to 100"):
        score_routes(moe, TOKENS.index_put((torch.tensor(1), torch.tensor(4)), torch.tensor(101)), 1, TOKENS)
    with pytest.raises(DataError, match="the model has no tokenizer"):
        score_routes(moe, ["w3 w4"], 1, TOKENS)
    with pytest.raises(DataError, match="make no tensor"):
        score_routes(moe, None, 1, TOKENS)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"tokens of shape \(0, 8\)"):
        score_routes(moe, TOKENS[:0], 1, TOKENS)
    with pytest.raises(DataError, match="a memory budget of 10 bytes"):
        score_routes(moe, TOKENS, 1, random_routes(moe, 1, TOKENS), memory_budget=10)
    with pytest.raises(ConfigError, match="method='fast'"):
        score_routes(moe, TOKENS, 1, random_routes(moe, 1, TOKENS), method="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["branch", "naive"])
def test_a_log_probability_that_is_not_finite_names_token_and_route(method: Any) -> None:
    moe = attached("olmoe")
    routes = random_routes(moe, 1, TOKENS)
    weights = torch.ones(routes.shape)
    weights[1, 4, 1] = 3e38
    with pytest.raises(DataError, match=r"sequence 1, position 4 under route 1 \(experts by layer: \{1: \["):
        score_routes(moe, TOKENS, 1, routes, weights=weights, method=method)


@pytest.mark.parametrize("way", ["copied keys", "shared keys", "grid"])
def test_a_branch_that_overflows_spoils_no_other(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a row with copied keys, whoever hides the branch's key multiplies it by zero, which does not hide NaN."""
    moe = attached("olmoe")
    base = record_pass(moe, TOKENS, [0])
    if way == "grid":
        monkeypatch.setitem(policy.GRID_SHARES, "cpu", policy.GridShares(0.0, 0.0))
    monkeypatch.setattr(branch_scores, "_WORTH_A_TRIAL", 1 if way == "shared keys" else 10**9)
    routes, weights = random_routes(moe, 0, TOKENS), torch.full((2, 8, 2, 2), 0.4)
    wanted, ids = scorable(base.is_real), TOKENS.roll(-1, dims=1).unsqueeze(-1)
    expected, *_ = exact_scores(base, {0: check_routes(base, 0, routes, weights)}, wanted, ids, Memory(moe))
    weights[1, 2, 1] = 3e38
    found, null, _ = exact_scores(base, {0: check_routes(base, 0, routes, weights)}, wanted, ids, Memory(moe))
    spoilt = wanted.unsqueeze(-1) & ~found[..., 0].isfinite()
    assert spoilt.nonzero().tolist() == [[1, 2, 1]]
    assert bool(null[wanted].isfinite().all())
    assert float((found - expected)[wanted.unsqueeze(-1) & ~spoilt].abs().max()) <= 1e-5
