"""Path patching: the direct path is a residual stream edited by hand, the total one a plain ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError, HookError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching import path_patching
from tests import tiny
from tests.integration.patching.structures import STRUCTURES
from tests.integration.routes.helpers import attached, precision

TOKENS, CLEAN = tiny.random_tokens(2, 5), tiny.random_tokens(2, 5, seed=3)
NAMES = ("expert_indices", "expert_weights", "expert_out", "routed_out", "router_logits")


def read(moe: MoEHooks, tokens: Tensor = TOKENS, hooks: Any = ()) -> dict[tuple[str, Any], Tensor]:
    kept: dict[tuple[str, Any], Tensor] = {}
    reads = [
        (moe.hook_name(name, layer), lambda value, hook, key=(name, layer): kept.__setitem__(key, value.clone()))
        for name in NAMES
        for layer in moe.layers
    ]
    moe.bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, *reads])
    return kept


def written(run: dict[tuple[str, Any], Tensor], layer: int, expert: int) -> Tensor:
    """What an expert adds, slot by slot."""
    out = torch.zeros_like(run["routed_out", layer])
    for row, at, slot in (run["expert_indices", layer] == expert).nonzero().tolist():
        out[row, at] += run["expert_weights", layer][row, at, slot] * run["expert_out", layer][row, at, slot]
    return out


def native_stream(name: str, layer: int) -> Tensor:
    """``[batch, pos, d_model]``: the residual stream that a layer's router reads the norm of."""
    hf: Any = tiny.build_hf(name, dtype=torch.float64)
    tiny.set_experts_implementation(hf, "eager")
    kept: dict[str, Tensor] = {}
    block = hf.model.layers[layer]
    at = block.mlp if name == "flex_olmo" else block.post_attention_layernorm
    handle = at.register_forward_pre_hook(lambda module, args: kept.__setitem__("x", args[0]))
    tiny.native_logits(hf, name, TOKENS)
    handle.remove()
    return kept["x"]


def directly(name: str, run: dict[tuple[str, Any], Tensor], source: tuple[int, int], target: int) -> Tensor:
    """The router's logits if the source had written nothing, and all in between what it wrote."""
    layer, expert = source
    hf: Any = tiny.build_hf(name, dtype=torch.float64)
    delta, stream = -written(run, layer, expert), native_stream(name, target)
    block = hf.model.layers[target]
    if name == "flex_olmo":
        after = hf.model.layers[layer].post_feedforward_layernorm
        routed = run["routed_out", layer]
        seen = stream + after(routed + delta) - after(routed)
    else:
        factor = hf.config.residual_multiplier if name == "granite_moe" else 1.0
        seen = block.post_attention_layernorm(stream + delta * factor)
    return seen @ tiny.native_layers(hf)[target].weight.T


@pytest.mark.parametrize("name", ["olmoe", "flex_olmo", "granite_moe"])
def test_both_paths_are_what_a_loop_by_hand_gives(name: str) -> None:
    moe = attached(name, torch.float64)
    with precision(torch.float64), torch.no_grad():
        run = read(moe)
        expert = int(run["expert_indices", 0][0, -1, 0])
        result = path_patching(moe, TOKENS, [(0, expert)], by_expert=True).data.isel(source=0)
        total = read(moe, hooks=mi.ablate_experts(moe, 0, expert))
        uses = (run["expert_indices", 0] == expert).any(dim=-1)
        for target in (1, 2):
            before = run["router_logits", target]
            for path, after in (
                ("direct", directly(name, run, (0, expert), target)),
                ("total", total["router_logits", target]),
            ):
                delta = after - before
                delta = delta - delta.mean(dim=-1, keepdim=True)
                chosen = run["expert_indices", target]
                rule = moe.spec(target).rule
                now = rule.route(after)[0]
                probability = rule.log_policy(after).exp() - rule.log_policy(before).exp()
                for row in range(2):
                    at = uses[row]
                    one = result.sel(path=path, layer=target, example=row)
                    if not bool(at.any()):
                        assert bool(one["effect"].isnull())
                        continue
                    lost = [1 - len({*a} & {*b}) / 2 for a, b in zip(chosen[row, at].tolist(), now[row, at].tolist())]
                    expected = {
                        "effect": float(delta[row, at].gather(-1, chosen[row, at]).mean(dim=-1).mean()),
                        "probability": float(probability[row, at].gather(-1, chosen[row, at]).sum(dim=-1).mean()),
                        "changed": float(np.mean(lost)),
                    }
                    for measure, value in expected.items():
                        assert abs(float(one[measure]) - value) < 1e-10, (measure, path, target)
                    assert np.abs(one["logit"].values - delta[row, at].mean(dim=0).numpy()).max() < 1e-10
    assert float(abs(result["effect"].sel(path="direct")).max()) > 1e-3


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_family_is_served_at_later_layers_for_sources_that_are_used(name: str) -> None:
    """All but the one with several residual streams."""
    moe = attached(name)
    layers: Any = moe.layers
    layer = layers[0]
    result = path_patching(moe, TOKENS[:1, :3], layer).data
    used = result["n_tokens"].isel(example=0) > 0
    later = result.sel(layer=[target for target in layers if target > layer])
    assert bool(later["effect"].notnull().all(dim=("path", "layer")).isel(example=0).equals(used))
    assert float(abs(later["effect"].sel(path="direct")).max()) > 1e-5
    assert bool(later["changed"].sel(source=used.values).notnull().all())


def test_a_patch_that_changes_nothing_has_no_effect() -> None:
    moe = attached("deepseek_v3")
    with torch.no_grad():
        cache = moe.bridge.run_with_cache(TOKENS, names_filter=moe.filter(*NAMES))[1]
    same = path_patching(moe, TOKENS, mode="clean", clean_cache=cache, batch_size=3)
    assert float(abs(same.data["effect"]).max()) < 1e-5
    assert float(same.data["changed"].max()) == 0


def test_means_and_clean_outputs_stand_in() -> None:
    moe = attached("olmoe", torch.float64)
    with precision(torch.float64), torch.no_grad():
        run, clean = read(moe), read(moe, CLEAN)
        cache = {moe.hook_name(name, layer): value for (name, layer), value in clean.items()}
        expert = int(run["expert_indices", 0][0, -1, 0])
        old, new = written(run, 0, expert), written(clean, 0, expert)
        uses = (run["expert_indices", 0] == expert).any(dim=-1)
        mean = old[uses].mean(dim=0)
        modes: list[tuple[Any, Tensor]] = [
            ("mean", torch.where(uses.unsqueeze(-1), mean - old, 0.0)),
            ("clean", new - old),
        ]
        for mode, delta in modes:
            result = path_patching(
                moe, TOKENS, (0, expert), 2, mode, cache if mode == "clean" else None, positions=[-1]
            ).data.isel(source=0)
            here = torch.zeros_like(delta)
            here[:, -1] = delta[:, -1]
            add = (moe.hook_name("routed_out", 0), lambda value, hook, here=here: value + here)
            after = read(moe, hooks=[add])["router_logits", 2]
            change = after - run["router_logits", 2]
            change = change - change.mean(dim=-1, keepdim=True)
            expected = change.gather(-1, run["expert_indices", 2]).mean(dim=-1)[:, -1]
            found = result["effect"].sel(path="total", layer=2).values
            known = ~np.isnan(found)
            assert known.any()
            assert np.abs(found[known] - expected.numpy()[known]).max() < 1e-10


def test_padding_and_batches_change_nothing(tmp_path: Path) -> None:
    moe = attached("olmoe")
    wide = torch.cat([torch.zeros(2, 2, dtype=torch.long), TOKENS], dim=1)
    mask = torch.cat([torch.zeros(2, 2, dtype=torch.long), torch.ones_like(TOKENS)], dim=1)
    plain, padded = path_patching(moe, TOKENS), path_patching(moe, wide, attention_mask=mask, batch_size=1)
    for name in ("effect", "share", "changed_elsewhere"):
        assert np.allclose(plain.data[name], padded.data[name], atol=1e-4, equal_nan=True)
    again = mi.load_result(plain.save(tmp_path / "paths.nc"))
    assert again.summary() == plain.summary()
    assert len(plain.table_of_sources(2)) > 4


def test_what_cannot_be_is_refused_before_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached("olmoe")
    monkeypatch.setattr(type(moe.bridge), "forward", lambda *a, **k: pytest.fail("a pass was run"))
    mistakes: list[tuple[dict[str, Any], Any, str]] = [
        ({"mode": "clean"}, ConfigError, "without a clean cache"),
        ({"mode": "zero", "clean_cache": {}}, ConfigError, "with a clean cache"),
        ({"mode": "clean", "clean_cache": {}}, HookError, r"a clean cache without blocks\.0\.hook_expert_indices"),
        ({"sources": [(0, 8)]}, RouteError, "an expert from 0 to 7"),
        ({"sources": [(0, 1, 2)]}, ConfigError, "a layer, or a pair"),
        ({"sources": "all"}, ConfigError, "a layer, or a pair"),
        ({"sources": 2}, ConfigError, "a router of a later layer"),
        ({"sources": [(5, 1)]}, HookError, "layer 5"),
        ({"positions": [9]}, ConfigError, "positions"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"tokens": TOKENS.float()}, DataError, "tokens of shape"),
    ]
    for kwargs, error, text in mistakes:
        with pytest.raises(error, match=text):
            path_patching(moe, **{"tokens": TOKENS, **kwargs})
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="several residual streams"):
        path_patching(attached("deepseek_v4"), TOKENS)
    with pytest.raises(ConfigError, match="an encoder-decoder"):
        path_patching(attached("switch_transformers"), TOKENS)
