"""Attribution: gradients by finite differences, the path's completeness, and the agreement that is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError
from tests import tiny
from tests.integration.patching.support import Pair, contribution_change, pair
from tests.integration.routes.helpers import attached, precision


def estimates(given: Pair, method: str = "gradient", **options: object) -> mi.patching.AttributionResult:
    options = {"audit": 0, "attention_mask": given.mask, **options}
    attribute: Any = mi.patching.attribution
    result: mi.patching.AttributionResult = attribute(
        given.moe,
        given.clean,
        given.corrupted,
        given.metric,
        method,
        **options,
    )
    return result


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v2", "llama4", "phimoe"])
def test_an_estimate_is_the_derivative_of_the_patch(name: str) -> None:
    """By a finite difference: a small step from an expert's corrupted contribution towards the clean one."""
    moe = attached(name, torch.float64)
    with precision(torch.float64):
        given = pair(moe)
        found, layer, step = estimates(given), moe.layers[0], 1e-6
        top = found.data["effect"].sel(layer=layer).sum("pos", skipna=True)
        expert = int(np.abs(top.values).sum(axis=-1).argmax())
        with torch.no_grad():
            full = contribution_change(given, layer, expert)
            values = [
                given.patched("routed_out", layer, lambda value, s=s: value + s * full)  # type: ignore[misc]
                for s in (step, -step)
            ]
        slope = ((values[0] - values[1]) / (2 * step)).numpy()
        assert np.abs(top.sel(expert=expert).values - slope).max() <= 1e-6
        assert np.abs(slope).max() >= 1e-3


def test_a_layers_integrated_estimates_add_up_to_its_whole_effect() -> None:
    moe = attached("deepseek_v2", torch.float64)
    with precision(torch.float64):
        given = pair(moe)
        found, layer = estimates(given, "integrated", steps=24), moe.layers[-1]  # no later router may jump
        clean, real = moe.cached(given.cache, "routed_out", layer), given.mask.bool().unsqueeze(-1)
        with torch.no_grad():
            whole = given.patched("routed_out", layer, lambda value: torch.where(real, clean, value)) - given.plain()
        total = found.data["effect"].sel(layer=layer).sum(["expert", "pos"]).values
        plain = estimates(given).data["effect"].sel(layer=layer).sum(["expert", "pos"]).values
    assert np.abs(total - whole.numpy()).max() <= 1e-4
    assert np.abs(plain - whole.numpy()).max() >= 1e-2


def test_agreement_is_reported_with_every_use(tmp_path: Path) -> None:
    given = pair(attached("deepseek_v2"))
    found = estimates(given, audit=24)
    assert "Spearman" in found.summary()
    assert "top-10 recall" in found.summary()
    again = found.agreement(24)
    assert again.summary() in found.summary()
    assert (again.n_top, again.n_random) == (12, 12)
    assert again.spearman >= 0.9
    assert again.recall >= 0.8
    loaded = mi.load_result(found.save(tmp_path / "attribution.nc"))
    assert isinstance(loaded, mi.patching.AttributionResult)
    assert loaded.summary() == found.summary()
    with pytest.raises(ConfigError, match="agreement of a result that was loaded"):
        loaded.agreement(8)
    assert "was not measured: call agreement" in estimates(given).summary()


@pytest.mark.parametrize("quantity", ["contribution", "output"])
def test_exact_cells_of_the_agreement_are_those_of_the_sweep(quantity: str) -> None:
    given = pair(attached("olmoe"))
    found = estimates(given, quantity=quantity)
    layer, pos = given.moe.layers[1], 4
    sweep = mi.patching.expert_out(
        given.moe, given.corrupted, given.cache, given.metric, layers=[layer], positions=[pos], quantity=quantity,  # type: ignore[arg-type]
        attention_mask=given.mask,
    )  # fmt: skip
    experts = range(given.moe.spec(layer).n_experts)
    assert found.exact is not None
    exact = found.exact([(1, expert, pos) for expert in experts])[0]
    assert np.abs(exact - sweep.data["effect"].values[0]).max() <= 1e-5
    assert np.abs(exact).max() >= 1e-3


def test_a_plain_number_and_left_alone_gradients() -> None:
    given = pair(attached("olmoe"))
    model = given.moe.bridge.original_model
    taking = [parameter.requires_grad for parameter in model.parameters()]
    whole = estimates(given)
    mean = mi.patching.attribution(
        given.moe, given.clean, given.corrupted, lambda logits: given.metric(logits).mean(),
        audit=0, attention_mask=given.mask,
    )  # fmt: skip
    assert np.abs(mean.data["effect"] - whole.data["effect"].sum("example") / 3).max() <= 1e-6
    assert [parameter.requires_grad for parameter in model.parameters()] == taking
    assert all(parameter.grad is None for parameter in model.parameters())
    short = whole.data["effect"].isel(example=2, pos=slice(6, None))
    assert np.isnan(short).all()


def test_it_takes_three_passes_of_which_one_is_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, calls = attached("olmoe"), []
    given = pair(moe)
    handle = moe.bridge.original_model.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    try:
        estimates(given)
    finally:
        handle.remove()
    assert calls == [False, True]


def test_refusals() -> None:
    moe, clean, corrupted = attached("olmoe"), tiny.random_tokens(2, 6), tiny.random_tokens(2, 6, seed=1)
    with pytest.raises(DataError, match=r"clean tokens of shape \(2, 5\) and corrupted ones of shape \(2, 6\)"):
        mi.patching.attribution(moe, clean[:, 1:], corrupted, lambda logits: logits.mean())
    with pytest.raises(ConfigError, match="a metric without a gradient"):
        mi.patching.attribution(moe, clean, corrupted, lambda logits: logits.detach().mean())
    with pytest.raises(ConfigError, match="method='eap'"):
        mi.patching.attribution(moe, clean, corrupted, lambda logits: logits.mean(), "eap")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps=0"):
        mi.patching.attribution(moe, clean, corrupted, lambda logits: logits.mean(), "integrated", steps=0)
