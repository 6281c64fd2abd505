"""Causal tracing: each restored run is what run_with_hooks gives by hand, and a planted carrier is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.utilities.statistics import derive_generator

import moe_interp as mi
from moe_interp.errors import ConfigError, HookError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching import trace_experts
from tests import tiny
from tests.integration.patching.structures import STRUCTURES
from tests.integration.patching.test_path_patching import read, written
from tests.integration.routes.helpers import attached, precision

TOKENS = tiny.random_tokens(2, 6)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def noised_embedding(moe: MoEHooks, example: int, draw: int, seed: int, positions: list[int], noise: float) -> Tensor:
    """``[pos, d_model]``, by hand."""
    kept: list[Tensor] = []
    keep = ("embed.hook_out", lambda value, hook: kept.append(value.clone()))
    moe.bridge.run_with_hooks(TOKENS, fwd_hooks=[keep])
    deviation = kept[0].std()
    drawn = torch.randn(len(positions), kept[0].shape[-1], generator=derive_generator(seed, "noise", example, draw),
                        dtype=torch.float32)  # fmt: skip
    added = torch.zeros_like(kept[0][0])
    added[positions] = drawn.to(added) * noise * deviation
    return added


@pytest.mark.parametrize("name", ["olmoe", "llama4"])
def test_restored_runs_are_what_hooks_by_hand_give(name: str) -> None:
    moe = attached(name, torch.float64)
    first, second = moe.layers[-2:]
    with precision(torch.float64), torch.no_grad():
        clean = read(moe, TOKENS)
        one, other = (int(clean["expert_indices", layer][0, 2, 0]) for layer in (first, second))
        result = trace_experts(
            moe, TOKENS, [1, 2], metric, 2.0, draws=2, seed=7, window=2, batch_size=2,
            coalitions={"both": [(first, one), (second, other)]},
        ).data  # fmt: skip
        for draw in range(2):
            noise = torch.stack([noised_embedding(moe, row, draw, 7, [1, 2], 2.0) for row in range(2)])
            noising = ("embed.hook_out", lambda value, hook, noise=noise: value + noise)

            def value(*hooks: Any, noising: Any = noising) -> Tensor:
                return metric(moe.bridge.run_with_hooks(TOKENS, fwd_hooks=[noising, *hooks]))

            def instead(layer: Any, expert: int, *before: Any, noising: Any = noising) -> Any:
                own = read(moe, TOKENS, [noising, *before])
                uses = (clean["expert_indices", layer] == expert).any(dim=-1, keepdim=True)
                weighted = [_written(moe, run, layer, expert) for run in (clean, own)]
                change = torch.where(uses, weighted[0] - weighted[1], 0.0)
                return (moe.hook_name("routed_out", layer), lambda value, hook: value + change)

            def whole(layer: Any) -> Any:
                return (moe.hook_name("routed_out", layer), lambda value, hook: clean["routed_out", layer])

            base, at = value(), instead(first, one)
            assert np.abs(result["noised"].sel(draw=draw).values - base.numpy()).max() < 1e-10
            both = value(at, instead(second, other, at))
            for cell, expected in (
                (f"{first} expert {one}", value(at)),
                (f"{second} expert {other}", value(instead(second, other))),
                ("both", both),
                (f"layer {first}", value(whole(first))),
                (f"layers {first} to {second}", value(whole(first), whole(second))),
            ):
                found = result["by_draw"].sel(cell=cell, draw=draw).values
                known = ~np.isnan(found)
                assert known.any(), cell
                assert np.abs(found - (expected - base).numpy())[known].max() < 1e-10, cell
    assert float(abs(result["by_draw"]).max()) > 1e-2


def _written(moe: MoEHooks, run: dict[tuple[str, Any], Tensor], layer: Any, expert: int) -> Tensor:
    if not moe.spec(layer).weight_on_input:
        return written(run, layer, expert)
    slot = (run["expert_indices", layer] == expert).unsqueeze(-1)
    return (run["expert_out", layer] * slot).sum(dim=2)


@pytest.mark.parametrize("name", (*STRUCTURES, "deepseek_v4"))
def test_every_family_is_noised_and_of_no_noise_there_is_nothing_to_restore(name: str) -> None:
    """And restoring layers moves the metric where there is noise."""
    moe = attached(name)
    result = trace_experts(moe, TOKENS[:1, :4], [1], metric, 1e-9, draws=1)
    assert float(abs(result.data["by_draw"]).max()) < 2e-4
    noisy = trace_experts(moe, TOKENS[:1, :4], [1], metric, 3.0, draws=1, experts=[], positions=[1])
    assert float(abs(noisy.data["noised"] - noisy.data["clean"]).max()) > 1e-3
    assert float(abs(noisy.data["effect"]).max()) > 1e-4


def test_an_expert_through_which_a_token_is_written_is_found() -> None:
    """The subject is the last token, where one expert of the first layer writes the answer's direction."""
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    model: Any = moe.bridge.original_model
    run = read(moe, TOKENS[:1])
    expert, token = int(run["expert_indices", 1][0, -1, 0]), 17
    neurons: dict[str, Tensor] = {}
    keep = (moe.hook_name("expert_post", 1), lambda value, hook: neurons.__setitem__("post", value.clone()))
    moe.bridge.run_with_hooks(TOKENS[:1], fwd_hooks=[keep])
    along, head = neurons["post"][0, -1, 0], model.lm_head.weight[token]
    with torch.no_grad():
        down = moe.spec(1).experts.down_proj
        down[expert] = torch.outer(head, along) * 60 / (head.norm() ** 2 * along.norm() ** 2)
        result = trace_experts(moe, TOKENS[:1], [-1], lambda logits: logits[:, -1, token], draws=6, positions=[-1])
    experts = result.top(20)
    experts = experts[experts["cell"].str.contains("expert")]
    assert experts["cell"].iloc[0] == f"1 expert {expert}"
    assert experts["mean"].iloc[0] > 3 * abs(experts["mean"].iloc[1])
    assert float(result.recovered().sel(cell=f"1 expert {expert}")) > 0.5


def test_draws_padding_and_batches_leave_the_numbers_as_they_are(tmp_path: Path) -> None:
    moe = attached("olmoe")
    wide = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(TOKENS)], dim=1)
    plain = trace_experts(moe, TOKENS, [[1], [2, 3]], metric, draws=3)
    padded = trace_experts(moe, wide, [[1], [2, 3]], metric, draws=3, attention_mask=mask, batch_size=1)
    assert plain.data["cell"].values.tolist() == padded.data["cell"].values.tolist()
    assert np.allclose(plain.data["by_draw"], padded.data["by_draw"], atol=2e-4, equal_nan=True)
    flags = torch.zeros(2, 6, dtype=torch.bool)
    flags[0, 1] = flags[1, 2] = flags[1, 3] = True
    assert trace_experts(moe, TOKENS, flags, metric, draws=3).data.equals(plain.data)
    again = mi.load_result(plain.save(tmp_path / "trace.nc"))
    assert again.summary() == plain.summary()
    draws = plain.table(over="draw")
    assert (draws["n"] == 3).all()
    assert (draws["ci_low"] <= draws["mean"]).all() or draws["mean"].isna().any()
    several = trace_experts(
        moe, TOKENS, [1], {"a": metric, "b": lambda logits: logits[:, 0, 0]}, draws=2, experts=[(0, 1)]
    )
    assert several.table("b")["cell"].tolist() == ["0 expert 1", "layer 0", "layer 1", "layer 2"]
    mean = trace_experts(moe, TOKENS, [1], lambda logits: metric(logits).mean(), draws=2, experts=[])
    assert "example" not in mean.data["effect"].dims


def test_what_cannot_be_is_refused_before_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached("olmoe")
    monkeypatch.setattr(type(moe.bridge), "forward", lambda *a, **k: pytest.fail("a pass was run"))
    mistakes: list[tuple[dict[str, Any], Any, str]] = [
        ({"subject_positions": [6]}, ConfigError, "positions"),
        ({"subject_positions": [[1]]}, ConfigError, "a list of positions for each of the 2 examples"),
        ({"subject_positions": torch.zeros(2, 6, dtype=torch.bool)}, ConfigError, "example 0 without a subject"),
        ({"subject_positions": torch.ones(2, 5, dtype=torch.bool)}, ConfigError, "subject_positions of shape"),
        ({"noise": 0}, ConfigError, "noise=0"),
        ({"noise": float("nan")}, ConfigError, "noise=nan"),
        ({"draws": 0}, ConfigError, "draws=0"),
        ({"window": 4}, ConfigError, "window=4"),
        ({"experts": [(0, 8)]}, RouteError, "ids from 0 to 7"),
        ({"experts": [3]}, ConfigError, r"pairs \(layer, expert\)"),
        ({"experts": [(4, 0)]}, HookError, "layer 4"),
        ({"coalitions": {"none": []}}, ConfigError, "at least one expert"),
        ({"coalitions": {"layer 0": [(0, 1)]}}, ConfigError, "'layer 0' twice"),
        ({"coalitions": [(0, 1)]}, ConfigError, "by name"),
        ({"metric": 3}, ConfigError, "metric=3"),
    ]
    for kwargs, error, text in mistakes:
        with pytest.raises(error, match=text):
            trace_experts(moe, **{"tokens": TOKENS, "subject_positions": [1], "metric": metric, **kwargs})
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="the metric gave shape"):
        trace_experts(moe, TOKENS, [1], lambda logits: logits[:, -1])
    with pytest.raises(ConfigError, match="an encoder-decoder"):
        trace_experts(attached("switch_transformers"), TOKENS, [1], metric)
