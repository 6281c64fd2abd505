"""What a sweep cannot use is refused before any pass, by name; TransformerLens' own tools beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens import patching as their_patching

import moe_interp as mi
from moe_interp.errors import AttachError, ConfigError, DataError, HookError
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.patching.metric import NaNMetricWarning
from tests import tiny
from tests.integration.routes.helpers import attached

CLEAN, CORRUPTED = tiny.random_tokens(2, 6), tiny.random_tokens(2, 6, seed=1)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


@contextmanager
def no_pass(moe: MoEHooks) -> Iterator[None]:
    """Fails where the model runs."""
    calls: list[Any] = []
    handle = moe.bridge.original_model.register_forward_pre_hook(lambda *args: calls.append(args))
    try:
        yield
    finally:
        handle.remove()
    assert not calls, "a forward pass ran"


def cached(moe: MoEHooks, *names: str) -> Any:
    return moe.bridge.run_with_cache(CLEAN, names_filter=moe.filter(*names))[1]


def test_caches() -> None:
    moe = attached("olmoe")
    routes, both = cached(moe, "expert_indices"), cached(moe, "expert_indices", "expert_out")
    with no_pass(moe):
        with pytest.raises(HookError, match=r"without blocks\.0\.hook_expert_out.*names_filter=moe\.filter"):
            mi.patching.expert_out(moe, CORRUPTED, routes, metric)
        with pytest.raises(HookError, match=r"without blocks\.2\.hook_expert_weights"):
            mi.patching.routes(moe, CORRUPTED, routes, metric, layers=2)
        with pytest.raises(DataError, match=r"of shape \(2, 6, 2, 32\).* of shape \(2, 5\).*same length"):
            mi.patching.expert_out(moe, CORRUPTED[:, 1:], both, metric, layers=[1])
        with pytest.raises(HookError, match="a clean cache without"):
            mi.patching.expert_out(moe, CORRUPTED, None, metric)


def test_layers_positions_experts_and_options() -> None:
    moe, cache = attached("deepseek_v2"), cached(attached("deepseek_v2"))
    call = mi.patching.expert_out
    with no_pass(moe):
        with pytest.raises(HookError, match="layer 0, which"):
            mi.patching.router_logits(moe, CORRUPTED, cache, metric, layers=[0])
        with pytest.raises(HookError, match="layer 9, which"):
            call(moe, CORRUPTED, cache, metric, layers=9)
        with pytest.raises(ConfigError, match=r"positions \[6\], which no example has"):
            mi.patching.routes(moe, CORRUPTED, cache, metric, positions=[1, 6])
        with pytest.raises(ConfigError, match=r"positions=\[1, 1\]"):
            mi.patching.routes(moe, CORRUPTED, cache, metric, positions=[1, 1])
        with pytest.raises(ConfigError, match="expert 99 at layers of 8 experts"):
            call(moe, CORRUPTED, cache, metric, experts=[0, 99])
        with pytest.raises(ConfigError, match="by='neuron'"):
            call(moe, CORRUPTED, cache, metric, by="neuron")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="chosen experts by slot"):
            call(moe, CORRUPTED, cache, metric, by="slot", experts=[1])
        with pytest.raises(ConfigError, match="method='fast'"):
            call(moe, CORRUPTED, cache, metric, method="fast")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="weights='theirs'"):
            mi.patching.routes(moe, CORRUPTED, cache, metric, weights="theirs")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="metric='p'"):
            call(moe, CORRUPTED, cache, "p")  # type: ignore[arg-type]
        with pytest.raises(DataError, match="padding between its tokens"):
            call(moe, CORRUPTED, cache, metric, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1], [1] * 6]))
        with pytest.raises(DataError, match="without a real token"):
            call(moe, CORRUPTED, cache, metric, attention_mask=torch.tensor([[0] * 6, [1] * 6]))
        with pytest.raises(DataError, match="token id 5000"):
            call(moe, CORRUPTED + 5000 - CORRUPTED, cache, metric)
    with pytest.raises(HookError, match="has no shared experts"):
        mi.patching.shared_out(attached("olmoe"), CORRUPTED, cached(attached("olmoe")), metric)


def test_metrics_of_another_form_are_refused_after_one_pass() -> None:
    moe, cache = attached("olmoe"), cached(attached("olmoe"))
    calls: list[Any] = []
    handle = moe.bridge.original_model.register_forward_pre_hook(lambda *args: calls.append(args))
    try:
        for wrong, words in (
            (lambda logits: logits[:, :, 5], r"the metric gave shape \(2, 6\).*one number, or one an example \[2\]"),
            (lambda logits: logits[0, -1, :3], r"gave shape \(3,\)"),
            (lambda logits: "much", "gave 'much', which makes no tensor"),
            (lambda logits: logits.mean() * float("nan"), "a metric of NaN on the corrupted run"),
            ({"a": metric, "b": lambda logits: logits.mean()}, "some give one number and some one an example"),
        ):
            calls.clear()
            with pytest.raises((ConfigError, DataError), match=words):
                mi.patching.router_logits(moe, CORRUPTED, cache, wrong)  # type: ignore[arg-type]
            assert len(calls) == 1
    finally:
        handle.remove()


def test_what_was_attached_without_experts_or_detached() -> None:
    bridge = tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe")
    moe = attach(bridge, expert_outputs=False)
    cache = cached(moe)
    with no_pass(moe):
        with pytest.raises(HookError, match="attached with expert_outputs=False"):
            mi.patching.expert_out(moe, CORRUPTED, cache, metric)
        with pytest.raises(HookError, match="attached with expert_outputs=False"):
            mi.patching.attribution(moe, CLEAN, CORRUPTED, metric)
    mi.patching.router_logits(moe, CORRUPTED, cache, metric, positions=[1])
    moe.detach()
    with pytest.raises(AttachError, match="no longer attached"):
        mi.patching.router_logits(moe, CORRUPTED, cache, metric)


def test_transformer_lens_own_patching_runs_on_an_attached_bridge() -> None:
    """Its functions give what they give without the hooks; its generic one, what our sweep gives."""
    bridge = tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe")
    _, plain_cache = bridge.run_with_cache(CLEAN)
    plain = their_patching.get_act_patch_resid_pre(bridge, CORRUPTED, plain_cache, lambda logits: metric(logits).mean())
    with attach(bridge) as moe:
        logits, cache = bridge.run_with_cache(CLEAN)
        own = their_patching.get_act_patch_resid_pre(bridge, CORRUPTED, cache, lambda logits: metric(logits).mean())
        assert torch.equal(own, plain)
        for get in (their_patching.get_act_patch_mlp_out, their_patching.get_act_patch_attn_out):
            result: Any = get(bridge, CORRUPTED, cache, metric, reduce="none", baseline=True)
            assert result.values.shape == (bridge.cfg.n_layers, 6, 2)
        theirs = their_patching.generic_activation_patch(
            bridge, CORRUPTED, cache, metric, their_patching.layer_pos_patch_setter, "router_logits",
            index_df=moe.patch_index(axes=("layer", "pos"), n_pos=6), reduce="none", baseline=True,
        )  # fmt: skip
        ours = mi.patching.router_logits(moe, CORRUPTED, cache, metric, clean_logits=logits)
        same = ours.to_patching_result()
        assert np.abs(ours.data["value"].values.reshape(-1, 2) - theirs.values.detach().numpy()).max() <= 2e-5
        assert type(same) is type(theirs)
        assert same.index_df.to_numpy().tolist() == theirs.index_df.to_numpy().tolist()
        assert torch.allclose(same.effect().flatten(0, 1).float(), theirs.effect(), atol=2e-5)
        low, high = same.bootstrap_ci(of_effect=True)
        assert bool((low <= high).all())
        by_example = same.normalized(metric(logits).detach().double())
        assert torch.allclose(by_example.flatten(0, 1).float(), theirs.normalized(metric(logits)), atol=1e-2, rtol=1e-2)


def test_misspelt_arguments_are_refused_before_any_pass() -> None:
    moe, cache = attached("olmoe"), cached(attached("olmoe"))
    calls: list[Any] = [
        lambda **more: mi.patching.router_logits(moe, CORRUPTED, cache, metric, **more),
        lambda **more: mi.patching.routes(moe, CORRUPTED, cache, metric, **more),
        lambda **more: mi.patching.expert_out(moe, CORRUPTED, cache, metric, **more),
        lambda **more: mi.patching.decompose(moe, CORRUPTED, cache, metric, **more),
        lambda **more: mi.patching.attribution(moe, CLEAN, CORRUPTED, metric, **more),
        lambda **more: mi.patching.trace_experts(moe, CLEAN, [1], metric, **more),
    ]
    with no_pass(moe):
        for call in calls:
            for name in ("postions", "return_type", "stop_at_layer", "logits_to_keep"):
                with pytest.raises(
                    ConfigError, match=rf"an argument '{name}'\. Expected: an argument of this function"
                ):
                    call(**{name: [1]})


def test_options_of_the_forward_pass_are_passed_on() -> None:
    moe, cache = attached("olmoe"), cached(attached("olmoe"))
    order = torch.arange(6).expand(2, -1)
    plain = mi.patching.decompose(moe, CORRUPTED, cache, metric, layers=2, positions=[-1])
    with_order = mi.patching.decompose(moe, CORRUPTED, cache, metric, layers=2, positions=[-1], position_ids=order)
    assert np.allclose(plain.data["effect"], with_order.data["effect"], atol=1e-6)


def test_clean_logits_and_caches_of_another_model_are_refused_before_any_pass() -> None:
    moe, cache = attached("olmoe"), cached(attached("olmoe"))
    name = moe.hook_name("router_logits", 0)
    wider = dict(cache.items()) | {name: torch.zeros(2, 6, 64)}
    beyond = dict(cache.items()) | {moe.hook_name("expert_indices", 1): torch.full((2, 6, 2), 63)}
    with no_pass(moe):
        with pytest.raises(DataError, match=r"clean_logits of shape \(2, 3\)"):
            mi.patching.router_logits(moe, CORRUPTED, cache, metric, clean_logits=torch.zeros(2, 3))
        with pytest.raises(DataError, match=r"router_logits of at least 64 experts in the clean cache.*8 experts"):
            mi.patching.router_logits(moe, CORRUPTED, wider, metric)
        with pytest.raises(DataError, match="expert_indices of at least 64 experts"):
            mi.patching.expert_out(moe, CORRUPTED, beyond, metric)
        with pytest.raises(ConfigError, match=r"audit=1.*at least 2 cells"):
            mi.patching.attribution(moe, CLEAN, CORRUPTED, metric, audit=1)


def test_clean_texts_padded_unlike_the_corrupted_ones_are_refused() -> None:
    hf = tiny.build_hf("olmoe")
    moe = attach(tiny.build_bridge(hf, "olmoe", tiny.tiny_tokenizer()))
    with (
        no_pass(moe),
        pytest.raises(DataError, match="a clean prompt of 5 tokens and a corrupted one of 3 in example 0"),
    ):
        mi.patching.attribution(moe, ["w3 w4 w5 w6", "w7 w8"], ["w9 w4", "w7 w8 w9 w10"], metric)


def test_the_errors_of_a_metric_are_its_own_and_none_is_no_metric() -> None:
    moe, cache = attached("olmoe"), cached(attached("olmoe"))

    def fails(logits: Tensor) -> Tensor:
        raise TypeError("a mistake in the metric")

    with pytest.raises(TypeError, match=r"^a mistake in the metric$"):
        mi.patching.router_logits(moe, CORRUPTED, cache, fails)
    with pytest.raises(ConfigError, match="the metric gave None, which makes no tensor"):
        mi.patching.router_logits(moe, CORRUPTED, cache, lambda logits: None)


def test_a_metric_of_nan_in_patched_runs_is_said() -> None:
    moe, cache = attached("olmoe"), cached(attached("olmoe"))
    plain = metric(moe.bridge(CORRUPTED)).detach()

    def only_there(logits: Tensor) -> Tensor:
        return torch.where((metric(logits) - plain).abs() < 1e-4, 0.0, torch.nan)

    with pytest.warns(NaNMetricWarning, match=r"NaN .* times in patched runs"):
        mi.patching.router_logits(moe, CORRUPTED, cache, only_there, layers=0)
    with pytest.warns(NaNMetricWarning):
        mi.patching.decompose(moe, CORRUPTED, cache, only_there, layers=0)


def test_attribution_without_a_cell_to_audit() -> None:
    moe = attached("olmoe")
    route = moe.bridge.run_with_cache(torch.arange(3, 60).unsqueeze(1), names_filter=moe.filter("expert_indices"))[1]
    sets = [
        {tuple(sorted(row)) for row in moe.cached(route, "expert_indices", 2)[token].tolist()} for token in range(57)
    ]
    used = [set().union(*each) for each in sets]
    first, second = next((a, b) for a in range(57) for b in range(57) if not used[a] & used[b])
    clean, corrupted = torch.tensor([[first + 3]]), torch.tensor([[second + 3]])
    found = mi.patching.attribution(moe, clean, corrupted, metric, layers=2, quantity="output")
    assert found.data.attrs["agreement"]["n_top"] == 0
    assert np.isnan(found.data.attrs["agreement"]["spearman"])
    assert not found.data["effect"].values.any()
    assert "Attribution" in found.summary()
