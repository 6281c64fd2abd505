"""Each sweep equals a loop of run_with_hooks that is written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe_interp as mi
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.patching import passes
from tests import tiny
from tests.integration.patching.support import (
    N_POS,
    Pair,
    contribution_cell,
    contribution_change,
    expert_cell,
    pair,
    route_cell,
    slot_cell,
    token_cell,
)
from tests.integration.routes.helpers import attached, precision

FAMILIES = ("olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "phimoe")
# the score scales the input; a norm after the sum; state-space layers; a latent width
ODD = ("llama4", "gemma4_text", "granite_moe_hybrid", "nemotron_h")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
POSITIONS = (2, 4, 6)


def sweeps(given: Pair) -> Iterator[tuple[mi.patching.PatchingSweep, Callable[..., Tensor]]]:
    """Every sweep, and the same cell by hand, of its labels."""
    moe = given.moe
    call: Any = partial(_call, given)
    yield call(mi.patching.router_logits, positions=POSITIONS), partial(token_cell, given, "router_logits")
    yield call(mi.patching.routes, positions=POSITIONS), partial(route_cell, given, own_weights=False)
    yield (
        call(mi.patching.routes, positions=POSITIONS[1:2], weights="own"),
        partial(route_cell, given, own_weights=True),
    )
    if any("shared_out" in moe.hooks(layer) for layer in moe.layers):
        yield call(mi.patching.shared_out, positions=POSITIONS), partial(token_cell, given, "shared_out")
    if "expert_out" in moe.hooks(moe.layers[0]):
        yield call(mi.patching.expert_out), partial(expert_cell, given)
        yield (
            call(mi.patching.expert_out, quantity="contribution", experts=[0, 1, 3]),
            partial(contribution_cell, given),
        )
        yield call(mi.patching.expert_out, by="slot", positions=POSITIONS[1:2]), partial(slot_cell, given)


def _call(given: Pair, sweep: Any, **options: Any) -> mi.patching.PatchingSweep:
    options = {"method": "rerun", "attention_mask": given.mask, "clean_logits": given.logits} | options
    metric = options.pop("metric", given.metric)
    result: mi.patching.PatchingSweep = sweep(given.moe, given.corrupted, given.cache, metric, **options)
    return result


def check(given: Pair, tolerance: float, every: int = 2) -> float:
    """Compares every so-manyth cell; the largest effect that was seen."""
    largest = 0.0
    base = given.plain()
    for result, by_hand in sweeps(given):
        values = result.data["value"]
        assert np.abs(result.data["baseline"].values - base.numpy()).max() <= tolerance
        cells = values.stack(cell=result.cell_axes).transpose("cell", "example")
        for labels, row in list(zip(cells["cell"].values, cells.values))[::every]:
            expected = by_hand(**dict(zip(result.cell_axes, (int(label) for label in labels)))).numpy()
            there = ~np.isnan(row)
            assert np.abs(row - expected)[there].max() <= tolerance, (result.data.attrs["what"], labels)
            largest = max(largest, float(np.abs(expected - base.numpy()).max()))
    return largest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_sweeps_are_loops(name: str, dtype: torch.dtype) -> None:
    moe = attached(name, dtype)
    with precision(dtype), torch.no_grad():
        assert check(pair(moe), TOLERANCE[dtype], 5 if dtype == torch.float64 else 11) >= 0.05


@pytest.mark.parametrize("name", ODD)
def test_odd_families(name: str) -> None:
    """Where the routed sum is not simply added; by whole passes where a layer cannot be started in the middle."""
    moe = attached(name, torch.float64)
    with precision(torch.float64), torch.no_grad():
        given = pair(moe)
        for sweep in (mi.patching.routes, mi.patching.expert_out):
            options = {"positions": [4]} if sweep is mi.patching.routes else {"quantity": "contribution"}
            auto, naive = (_call(given, sweep, method=method, **options) for method in ("auto", "naive"))
            assert np.nanmax(np.abs(auto.data["value"] - naive.data["value"])) <= 1e-10
            assert np.nanmax(np.abs(naive.data["effect"])) >= 1e-3


@pytest.fixture(scope="module")
def demo() -> MoEHooks:
    return mi.load_demo()[0]


def test_the_demo_model(demo: MoEHooks) -> None:
    with torch.no_grad():
        assert check(pair(demo), 2e-5, every=7) >= 0.05


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_padding_changes_nothing(name: str) -> None:
    """Each example of a padded batch has what it has alone, without padding, at the same positions."""
    moe = attached(name, torch.float64)
    with precision(torch.float64), torch.no_grad():
        given = pair(moe)
        for sweep in (mi.patching.router_logits, mi.patching.expert_out):
            whole = _call(given, sweep)
            for row, (first, length) in enumerate(zip(given.first, given.lengths)):
                part = slice(first, first + length)
                _, cache = moe.bridge.run_with_cache(given.clean[row : row + 1, part])
                alone = sweep(
                    moe, given.corrupted[row : row + 1, part], cache,
                    lambda logits: logits[:, -1].log_softmax(dim=-1)[:, 5],
                )  # fmt: skip
                mine, n = whole.data["value"].isel(example=row).values, alone.data["value"].isel(example=0).values
                assert np.abs(mine[:, : n.shape[1]] - n).max() <= 1e-10
                assert np.isnan(mine[:, n.shape[1] :]).all()
                patched = whole.data["n_patched"].isel(example=row).values[:, : n.shape[1]]
                assert np.array_equal(patched, alone.data["n_patched"].isel(example=0).values)


def test_counts_and_cells_that_change_nothing() -> None:
    given = pair(attached("olmoe"))
    result, layer = _call(given, mi.patching.expert_out), given.moe.layers[-1]
    ours, theirs = given.seen("expert_indices", layer)
    for expert in range(given.moe.spec(layer).n_experts):
        real = given.mask.bool()
        used, there = ((run == expert).any(dim=-1) & real for run in (theirs, ours))
        cell = result.data.sel(layer=layer, expert=expert)
        assert cell["n_patched"].values.tolist() == (used & there).sum(dim=1).tolist()
        assert cell["n_unmatched"].values.tolist() == (used & ~there).sum(dim=1).tolist()
        nothing = ~(used & there)[:, 3:].any(dim=1).numpy()  # before position 3 the prompts are the same
        assert (cell["effect"].values[nothing[: len(nothing)]] == 0.0).all() or not nothing.any()
    slots = _call(given, mi.patching.expert_out, by="slot")
    assert (slots.data["effect"].sel(pos=[0, 1]).isel(example=0) == 0.0).all()  # one prefix
    assert slots.data.attrs["n_skipped"] > 0
    assert np.isnan(slots.data["effect"].sel(pos=N_POS - 1).isel(example=[1, 2])).all()


def test_contributions_of_a_layer_add_up_to_its_routed_output() -> None:
    moe = attached("olmoe", torch.float64)
    with precision(torch.float64), torch.no_grad():
        given, layer = pair(moe), moe.layers[0]
        clean, real = moe.cached(given.cache, "routed_out", layer), given.mask.bool().unsqueeze(-1)
        whole = given.patched("routed_out", layer, lambda value: torch.where(real, clean, value))
        experts = range(moe.spec(layer).n_experts)
        change = torch.stack([contribution_change(given, layer, expert) for expert in experts]).sum(dim=0)
        summed = given.patched("routed_out", layer, lambda value: value + change)
        assert float((summed - whole).abs().max()) <= 1e-10


def test_memory_budget_and_several_metrics() -> None:
    given = pair(attached("olmoe"))
    whole = _call(given, mi.patching.expert_out)
    small = _call(given, mi.patching.expert_out, memory_budget=2**19)
    assert np.abs(whole.data["value"] - small.data["value"]).max() <= 2e-5
    named = {"log p": given.metric, "p": lambda logits: given.metric(logits).exp()}
    both = mi.patching.expert_out(given.moe, given.corrupted, given.cache, named, attention_mask=given.mask)
    assert np.abs(both.data["value"].sel(metric="log p") - whole.data["value"]).max() <= 2e-5
    assert np.abs(np.exp(whole.data["value"]) - both.data["value"].sel(metric="p")).max() <= 1e-5
    mean = mi.patching.expert_out(
        given.moe, given.corrupted, given.cache, lambda logits: given.metric(logits).mean(), attention_mask=given.mask
    )
    assert "example" not in mean.data["effect"].dims
    assert np.abs(mean.data["effect"] - whole.data["effect"].mean("example")).max() <= 2e-5


def test_a_metric_that_writes_into_its_logits() -> None:
    given = pair(attached("olmoe"))

    def rude(logits: Tensor) -> Tensor:
        value = given.metric(logits)
        logits.zero_()
        return value

    whole = _call(given, mi.patching.expert_out)
    spoiled = mi.patching.expert_out(given.moe, given.corrupted, given.cache, rude, attention_mask=given.mask)
    assert np.abs(whole.data["value"] - spoiled.data["value"]).max() <= 2e-5


def test_metrics_that_hide_what_they_read_at_earlier_positions() -> None:
    """On the corrupted run they are 0, with NaN or with other logits in place of what they read as well."""
    given = pair(attached("olmoe"))
    with torch.no_grad():
        plain = given.moe.bridge(given.corrupted, attention_mask=given.mask)[:, 5, 7] + 1e-4
    last_only = given.metric

    def above(logits: Tensor) -> Tensor:
        return (logits[:, 5, 7] > plain).float()

    metrics: dict[str, Callable[[Tensor], Any]] = {
        "compared": above,
        "by a step": lambda logits: torch.heaviside(logits[:, 5, 7] - plain, torch.zeros(())),
        "ranked": lambda logits: torch.stack([logits[:, 5, 7], plain]).argmin(dim=0) * 1.0,
        "in numpy": lambda logits: (logits.numpy()[:, 5, 7] > plain.numpy()).astype(float),
        "beside the last": lambda logits: last_only(logits) + above(logits),
    }
    for name, metric in metrics.items():
        found, expected = (
            _call(given, mi.patching.router_logits, method=method, metric=metric).data["effect"].values
            for method in ("rerun", "naive")
        )
        assert np.nanmax(np.abs(expected)) > 0.9, name
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=name)


def test_a_metric_that_fails_leaves_the_model_as_it_was() -> None:
    given = pair(attached("olmoe"))
    calls: list[None] = []

    def failing(logits: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return given.metric(logits)

    before = given.moe.bridge(given.corrupted, attention_mask=given.mask)
    with pytest.raises(KeyboardInterrupt):
        mi.patching.expert_out(given.moe, given.corrupted, given.cache, failing, attention_mask=given.mask)
    assert torch.equal(given.moe.bridge(given.corrupted, attention_mask=given.mask), before)
    assert not any(point.has_hooks() for point in given.moe.bridge.hook_dict.values())


def test_within_inference_mode() -> None:
    given = pair(attached("olmoe"))
    expected = _call(given, mi.patching.expert_out)
    with torch.inference_mode():
        found = _call(pair(attached("olmoe")), mi.patching.expert_out)
        estimates = mi.patching.attribution(given.moe, given.clean, given.corrupted, given.metric, audit=8)
    assert np.abs(found.data["value"] - expected.data["value"]).max() <= 2e-5
    assert np.abs(estimates.data["effect"]).max() > 0


def test_other_hooks_on_the_model_stay_in_force() -> None:
    """An SAE's splice, say: every cell is then a whole pass, under that hook."""
    given, layer = pair(attached("olmoe")), 1
    plain = _call(given, mi.patching.expert_out)
    half = [(f"blocks.{layer}.hook_resid_pre", lambda value, hook: value * 0.5)]
    with given.moe.bridge.hooks(fwd_hooks=half):
        hooked = _call(given, mi.patching.expert_out, method="auto")
        with pytest.raises(ConfigError, match="other hooks are on the model"):
            _call(given, mi.patching.expert_out)
    assert hooked.data.attrs["method"] == "naive"
    assert np.abs(hooked.data["baseline"] - plain.data["baseline"]).max() >= 1e-3


def test_a_model_that_cannot_be_started_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    given = pair(attached("olmoe"))
    expected = _call(given, mi.patching.expert_out, method="naive")
    monkeypatch.setattr(passes, "null_difference", lambda *args, **kwargs: 1.0)
    with pytest.warns(passes.RerunNotExactWarning, match=r"changes its predictions by 1.0e\+00 nats"):
        found = _call(given, mi.patching.expert_out, method="auto")
    assert found.data["value"].equals(expected.data["value"])
    assert found.data.attrs["method"] == "naive"
    with pytest.raises(ConfigError, match="nothing patched differs"):
        _call(given, mi.patching.expert_out)


def test_an_encoder_decoder_is_patched_by_whole_passes() -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("switch_transformers"), "switch_transformers"))
    clean = tiny.random_tokens(2, 6)
    corrupted = clean.clone()
    corrupted[:, 2] = tiny.random_tokens(2, 1, seed=5)[:, 0]
    layer: Any = moe.layers[0]
    options: dict[str, Any] = {"decoder_input": clean.flip(-1)}
    _, cache = moe.bridge.run_with_cache(clean, **options)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 5]

    found = mi.patching.router_logits(moe, corrupted, cache, metric, layers=[layer], **options)
    logits = moe.cached(cache, "router_logits", layer)

    def write(value: Tensor, hook: Any) -> Tensor:
        value[:, 2] = logits[:, 2]
        return value

    hooks: Any = [(moe.hook_name("router_logits", layer), write)]
    by_hand = metric(moe.bridge.run_with_hooks(corrupted, fwd_hooks=hooks, **options))
    assert found.data["layer"].values.tolist() == [f"encoder.{layer[1]}"]
    assert np.abs(found.data["value"].values[0, 2] - by_hand.detach().numpy()).max() <= 1e-5
