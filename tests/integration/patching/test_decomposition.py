"""Routing against computation: each patch is what a loop by hand gives, and together they are all of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError, HookError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching import decompose
from tests import tiny
from tests.integration.patching.structures import STRUCTURES
from tests.integration.routes.helpers import attached, precision

CLEAN, CORRUPTED = tiny.random_tokens(2, 5), tiny.random_tokens(2, 5, seed=3)
FACTORS = ("experts", "weights", "computation")


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def clean_cache(moe: MoEHooks, tokens: Tensor = CLEAN, **kwargs: Any) -> Any:
    names = moe.filter("router_in", "router_logits", "expert_indices", "expert_weights", "expert_out", "routed_out")
    with torch.no_grad():
        return moe.bridge.run_with_cache(tokens, names_filter=names, **kwargs)[1]


def check_together(name: str, dtype: torch.dtype, bound: float) -> None:
    moe = attached(name, dtype)
    layer = moe.layers[0]
    with precision(dtype), torch.no_grad():
        cache = clean_cache(moe)
        result = decompose(moe, CORRUPTED, cache, metric, layer)
        routed = moe.hook_name("routed_out", layer)
        base = metric(moe.bridge(CORRUPTED))
        whole = metric(moe.bridge.run_with_hooks(CORRUPTED, fwd_hooks=[(routed, lambda value, hook: cache[routed])]))
    effect = result.data["effect"].sel(layer=layer)
    together = effect.sel(part="together").values
    assert np.abs(together - (whole - base).numpy()).max() < bound
    assert np.abs(together).min() > 1e-6
    alone = sum(effect.sel(part=factor) for factor in FACTORS)
    assert np.abs(effect.sel(part="interaction") - (together - alone)).max() < bound
    assert np.abs(result.data["shapley"].sel(layer=layer).sum("factor") - together).max() < bound


@pytest.mark.parametrize("name", (*STRUCTURES, "deepseek_v4"))
def test_all_together_is_the_clean_routed_output_in_every_family(name: str) -> None:
    check_together(name, torch.float32, 2e-5)


@pytest.mark.parametrize("name", ["olmoe", "llama4", "gemma4_text"])
def test_all_together_is_the_clean_routed_output_to_float64(name: str) -> None:
    check_together(name, torch.float64, 1e-10)


def block_by_hand(moe: MoEHooks, layer: int, indices: Tensor, weights: Tensor, read: Tensor) -> Tensor:
    """The weighted sum, token by token and slot by slot, of the transformers experts (OLMoE's form)."""
    experts: Any = moe.spec(layer).experts
    out = torch.zeros_like(read)
    for row, at in itertools.product(range(read.shape[0]), range(read.shape[1])):
        for slot, expert in enumerate(indices[row, at].tolist()):
            gate, up = (experts.gate_up_proj[expert] @ read[row, at]).chunk(2)
            out[row, at] += weights[row, at, slot] * (experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
    return out


def test_every_subset_is_what_a_loop_by_hand_gives() -> None:
    moe = attached("olmoe", torch.float64)
    layer = 1
    with precision(torch.float64), torch.no_grad():
        cache = clean_cache(moe)
        result = decompose(moe, CORRUPTED, cache, metric, layer, positions=[1, -1])
        theirs = clean_cache(moe, CORRUPTED)
        base = metric(moe.bridge(CORRUPTED))
        where = torch.zeros(2, 5, 1, dtype=torch.bool)
        where[:, [1, 4]] = True
        name = {
            key: moe.hook_name(key, layer) for key in ("router_in", "router_logits", "expert_indices", "routed_out")
        }
        for n in (1, 2, 3):
            for subset in itertools.combinations(FACTORS, n):
                run = {f: cache if f in subset else theirs for f in FACTORS}
                indices = run["experts"][name["expert_indices"]]
                probs = run["weights"][name["router_logits"]].softmax(dim=-1)
                weights = probs.gather(-1, indices)
                new = block_by_hand(moe, layer, indices, weights, run["computation"][name["router_in"]])
                hook = (name["routed_out"], lambda value, hook, new=new: torch.where(where, new, value))
                expected = metric(moe.bridge.run_with_hooks(CORRUPTED, fwd_hooks=[hook])) - base
                part = "together" if n == 3 else "+".join(subset)
                found = result.data["effect"].sel(layer=layer, part=part).values
                assert np.abs(found - expected.numpy()).max() < 1e-10, subset


def test_shapley_values_are_the_mean_over_orders() -> None:
    moe = attached("olmoe")
    effect = decompose(moe, CORRUPTED, clean_cache(moe), metric, 2).data
    values = {frozenset[str](): 0.0}
    for n in (1, 2, 3):
        for subset in itertools.combinations(FACTORS, n):
            part = "together" if n == 3 else "+".join(subset)
            values[frozenset(subset)] = float(effect["effect"].sel(layer=2, part=part, example=0))
    for factor in FACTORS:
        gains = []
        for order in itertools.permutations(FACTORS):
            before = frozenset(order[: order.index(factor)])
            gains.append(values[before | {factor}] - values[before])
        assert float(effect["shapley"].sel(layer=2, factor=factor, example=0)) == pytest.approx(
            np.mean(gains), abs=1e-5
        )


def test_padding_changes_nothing() -> None:
    moe = attached("deepseek_v3", torch.float64)
    with precision(torch.float64):
        alone = decompose(moe, CORRUPTED[:1], clean_cache(moe, CLEAN[:1]), metric)
        wide = torch.cat([torch.zeros(1, 2, dtype=torch.long), CORRUPTED[:1]], dim=1)
        mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)], dim=1)
        clean = torch.cat([torch.zeros(1, 2, dtype=torch.long), CLEAN[:1]], dim=1)
        padded = decompose(moe, wide, clean_cache(moe, clean, attention_mask=mask), metric, attention_mask=mask)
    assert np.abs(alone.data["effect"] - padded.data["effect"]).max() < 1e-10
    assert np.array_equal(alone.data["route_change"], padded.data["route_change"])


def test_the_same_prompt_gives_nothing_and_the_result_is_kept(tmp_path: Path) -> None:
    moe = attached("olmoe")
    same = decompose(moe, CLEAN, clean_cache(moe), {"difference": metric, "first": lambda logits: logits[:, 0, 0]})
    assert np.abs(same.data["effect"]).max() < 1e-5
    assert float(same.data["route_change"].max()) == 0
    result = decompose(moe, CORRUPTED, clean_cache(moe), lambda logits: metric(logits).mean())
    again = mi.load_result(result.save(tmp_path / "split.nc"))
    assert again.summary() == result.summary()
    assert list(result.by_layer().columns[:2]) == ["layer", "experts"]
    assert len(result.table()) == 3 * 8


def test_what_cannot_be_is_refused_before_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached("olmoe")
    cache = clean_cache(moe)
    short = dict(cache.items())
    short.pop(moe.hook_name("router_in", 1))
    monkeypatch.setattr(type(moe.bridge), "forward", lambda *a, **k: pytest.fail("a pass was run"))
    with pytest.raises(HookError, match=r"a clean cache without blocks\.1\.hook_router_in"):
        decompose(moe, CORRUPTED, short, metric)
    with pytest.raises(DataError, match="same length"):
        decompose(moe, CORRUPTED[:, :4], cache, metric)
    with pytest.raises(ConfigError, match="positions"):
        decompose(moe, CORRUPTED, cache, metric, positions=[7])
    with pytest.raises(HookError, match="layer 9"):
        decompose(moe, CORRUPTED, cache, metric, layers=9)
    with pytest.raises(ConfigError, match="metric="):
        decompose(moe, CORRUPTED, cache, None)  # type: ignore[arg-type]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="the metric gave shape"):
        decompose(moe, CORRUPTED, cache, lambda logits: logits[:, -1])
