"""Seeds, counts, layers and experts: whole numbers of any library, and nothing else, before the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moe_interp as mi
from moe_interp import stats
from moe_interp.errors import MoEInterpError
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.model import ModelConfig
from tests import tiny

WHOLE = [np.int64(1), np.uint8(1), torch.tensor(1)]
STRANGE = [True, np.True_, torch.tensor(True), 1.0, np.float64(1), 1.5, "1x", [1.0]]
TOKENS = tiny.random_tokens(1, 4)
ROUTES = torch.tensor([0, 1]).expand(1, 4, 1, 2)
QUIET: dict[str, Any] = {"progress": False}
ITEMS = [{"id": np.int64(i), "domain": "d", "prompt": [3, 4 + i], "answer": [5]} for i in range(2)]
ITEM: dict[str, Any] = {"layers": [1], "experts": [0], **QUIET}
SEQUENCE: dict[str, Any] = {"layers": [1], "n_routes": 1, "controls": False, **QUIET}


@pytest.fixture(scope="module")
def moe() -> mi.MoEHooks:
    return mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))


MODEL_CALLS: dict[str, Callable[[mi.MoEHooks, Any], Any]] = {
    "counterfactual seed": lambda moe, n: mi.counterfactual_routes(moe, TOKENS, **SEQUENCE | {"seed": n}),
    "counterfactual n_routes": lambda moe, n: mi.counterfactual_routes(moe, TOKENS, **SEQUENCE | {"n_routes": n}),
    "counterfactual layer": lambda moe, n: mi.counterfactual_routes(moe, TOKENS, **SEQUENCE | {"layers": [n]}),
    "isolate seed": lambda moe, n: mi.isolate_experts(moe, ITEMS, **ITEM | {"seed": n}),
    "isolate random_draws": lambda moe, n: mi.isolate_experts(moe, ITEMS, **ITEM | {"random_draws": n}),
    "isolate layer": lambda moe, n: mi.isolate_experts(moe, ITEMS, **ITEM | {"layers": [n]}),
    "isolate expert": lambda moe, n: mi.isolate_experts(moe, ITEMS, **ITEM | {"experts": [n]}),
    "isolate set": lambda moe, n: mi.isolate_experts(moe, ITEMS, **ITEM | {"experts": [(n, 5)]}),
    "score layer": lambda moe, n: mi.score_routes(moe, TOKENS, n, ROUTES),
    "score position": lambda moe, n: mi.score_routes(moe, TOKENS, 1, ROUTES, positions=[n]),
    "screen keep": lambda moe, n: mi.screen_routes(moe, TOKENS, [1], {1: ROUTES}, keep=n),
    "screen audit": lambda moe, n: mi.screen_routes(moe, TOKENS, [1], {1: ROUTES}, audit=n),
    "screen seed": lambda moe, n: mi.screen_routes(moe, TOKENS, [1], {1: ROUTES}, seed=n),
    "random seed": lambda moe, n: mi.random_routing(moe, seed=n),
    "random layer": lambda moe, n: mi.random_routing(moe, layers=[n]),
    "ablate seed": lambda moe, n: mi.ablate_experts(moe, 1, 0, mode="resample", seed=n),
    "ablate expert": lambda moe, n: mi.ablate_experts(moe, 1, n),
    "ablate experts": lambda moe, n: mi.ablate_experts(moe, 1, [0, n]),
    "force expert": lambda moe, n: mi.force_experts(moe, 1, n),
    "force layer": lambda moe, n: mi.force_experts(moe, n, 0),
    "bias layer": lambda moe, n: mi.bias_router(moe, n, [0.0] * 8),
    "hook name": lambda moe, n: moe.hook_name("router_logits", n),
    "spec": lambda moe, n: moe.spec(n),
}
OTHER_CALLS: dict[str, Callable[[Any], Any]] = {
    "pool": lambda n: mi.GumbelTopK(pool=n),
    "trace experts": lambda n: mi.RoutingTrace.from_arrays(np.zeros((2, 1, 1), int), n_experts=n),
    "trace layers": lambda n: mi.RoutingTrace.from_arrays(np.zeros((2, 1, 1), int), n_experts=3, layers=[n]),
    "stream": lambda n: stats.derive_rng(n, "label"),
    "testbed seed": lambda n: TestbedConfig(seed=n),
    "testbed steps": lambda n: TestbedConfig(steps=n),
    "testbed optional": lambda n: TestbedConfig(domains_per_micro_batch=n),
    "testbed layers": lambda n: ModelConfig(n_layers=n),
}


@pytest.mark.parametrize("name", MODEL_CALLS)
def test_a_model_is_not_run_for_what_is_no_whole_number(moe: mi.MoEHooks, name: str) -> None:
    passes: list[None] = []
    embedding = moe.bridge.original_model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, args: passes.append(None))
    try:
        for value in STRANGE:
            with pytest.raises(MoEInterpError):
                MODEL_CALLS[name](moe, value)
    finally:
        handle.remove()
    # positions are counted on the recorded pass
    assert not passes or name == "score position"
    MODEL_CALLS[name](moe, WHOLE[len(name) % len(WHOLE)])


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_whole_numbers_without_a_model(name: str) -> None:
    for value in WHOLE:
        if name != "pool" or isinstance(value, np.integer):
            OTHER_CALLS[name](value)
    for value in STRANGE:
        with pytest.raises(MoEInterpError):
            OTHER_CALLS[name](value)


def test_a_configuration_holds_pythons_integers() -> None:
    config = TestbedConfig(seed=np.int64(3), model={"n_layers": np.int32(2)})
    assert (type(config.seed), type(config.model.n_layers)) == (int, int)
    assert config.fingerprint() == TestbedConfig(seed=3, model=ModelConfig(n_layers=2)).fingerprint()


@pytest.mark.parametrize("count", [True, np.True_, 9.0, np.float64(9), "9", 0])
def test_counts_of_resamples_and_permutations(count: Any) -> None:
    values = np.arange(9.0)
    for call in (
        lambda: stats.bootstrap_interval(values, n_resamples=count),
        lambda: stats.paired_permutation(values, n_permutations=count),
        lambda: stats.domain_effect(np.zeros((6, 1, 2)), [0, 0, 0, 1, 1, 1], n_permutations=count),
        lambda: stats.split_half_reliability(np.arange(24.0).reshape(8, 3), n_splits=count),
    ):
        with pytest.raises(MoEInterpError, match=r"(n_resamples|n_permutations|n_splits) is"):
            call()


def test_a_seed_of_numpy_is_that_of_python(moe: mi.MoEHooks) -> None:
    one, other = (mi.counterfactual_routes(moe, TOKENS, **SEQUENCE | {"seed": seed}) for seed in (3, np.int64(3)))
    np.testing.assert_array_equal(one.data["route"], other.data["route"])
    assert one.data.attrs == other.data.attrs


@pytest.mark.parametrize("name", ["k", "random_draws", "seed"])
def test_numbers_of_the_domain_router(moe: mi.MoEHooks, name: str) -> None:
    isolated = mi.isolate_experts(moe, ITEMS, layers=[1], **QUIET)
    options: dict[str, Any] = {"k": 1, "random_draws": 1, **QUIET}
    for value in STRANGE:
        with pytest.raises(MoEInterpError, match=f"{name}="):
            mi.score_domain_router(moe, ITEMS, isolated, **options | {name: value})
    for value in WHOLE:
        mi.score_domain_router(moe, ITEMS, isolated, **options | {name: value})
