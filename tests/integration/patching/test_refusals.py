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
            (lambda logits: "much", "gave what makes no tensor"),
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
