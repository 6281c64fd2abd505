"""Whatever measures a model does it in eval mode, and leaves modes, gradients and flags as they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moe_interp as mi
from moe_interp.engine.eval_mode import eval_mode
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.testbed.generate import complete
from tests import tiny
from tests.integration.routes.helpers import random_routes

TOKENS = tiny.random_tokens(2, 7)
Measurement = Callable[[MoEHooks], np.ndarray]


def items() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"id": str(i), "domain": "ab"[i % 2], "prompt": rng.integers(3, 90, 4).tolist(), "answer": [7 + i, 9]}
        for i in range(4)
    ]


def isolated(moe: MoEHooks) -> mi.IsolationResult:
    return mi.isolate_experts(moe, items(), layers=[-1], experts=[0, 1], random_draws=1, progress=False)


def counterfactual(moe: MoEHooks) -> np.ndarray:
    found = mi.counterfactual_routes(moe, TOKENS.tolist(), layers=[-1], n_routes=2, controls=False, progress=False)
    return found.data["logp"].values


def scored(moe: MoEHooks, method: Any) -> np.ndarray:
    layer = moe.layers[-1]
    return mi.score_routes(moe, TOKENS, layer, random_routes(moe, layer, TOKENS), method=method).numpy()


def screened(moe: MoEHooks) -> np.ndarray:
    layer = moe.layers[0]
    routes = {layer: random_routes(moe, layer, TOKENS)}
    return mi.screen_routes(moe, TOKENS, [layer], routes, keep=1, audit=1)[layer].credit.numpy()


def replaced(moe: MoEHooks) -> np.ndarray:
    with eval_mode(moe.bridge):
        result = isolated(moe)
    return mi.score_domain_router(moe, items(), result, k=1, random_draws=1, progress=False).data["score"].values


def verified(moe: MoEHooks) -> np.ndarray:
    table = moe.verify(TOKENS, layers=[-1])
    assert table.ok
    return table["figure"].to_numpy(dtype=float)


MEASUREMENTS: dict[str, Measurement] = {
    "isolate_experts": lambda moe: isolated(moe).data["delta"].values,
    "counterfactual_routes": counterfactual,
    "score_routes by branches": partial(scored, method="branch"),
    "score_routes naively": partial(scored, method="naive"),
    "screen_routes": screened,
    "score_domain_router": replaced,
    "verify": verified,
}


def noisy(name: str = "phimoe") -> MoEHooks:
    """A model whose training would change every number: random routes, jitter and dropout."""
    moe = attach(tiny.build_bridge(tiny.build_hf(name), name))
    for module in moe.bridge.original_model.modules():
        for noise in ("jitter_noise", "input_jitter_noise", "attention_dropout"):
            if hasattr(module, noise):
                setattr(module, noise, 0.2)
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return moe


def train_partly(moe: MoEHooks) -> None:
    """Some submodules train, others do not, in no order that ``train()`` and ``eval()`` could make."""
    for i, module in enumerate(moe.bridge.original_model.modules()):
        module.training = i % 3 != 0
    moe.bridge.training = True


def state(moe: MoEHooks) -> dict[str, Any]:
    modules = {**dict(moe.bridge.named_modules()), **dict(moe.bridge.original_model.named_modules())}
    parameters = dict(moe.bridge.original_model.named_parameters())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "flags": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {
            name: (id(p.grad), None if p.grad is None else p.grad.sum().item()) for name, p in parameters.items()
        },
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def with_gradients(moe: MoEHooks) -> None:
    for i, parameter in enumerate(moe.bridge.original_model.parameters()):
        parameter.requires_grad = i % 4 != 1
        parameter.grad = torch.full_like(parameter, 2.0) if i % 2 else None


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_model_in_training_is_measured_as_in_eval_mode(name: str) -> None:
    moe, measure = noisy(), MEASUREMENTS[name]
    expected = measure(moe)
    train_partly(moe)
    with_gradients(moe)
    before, random = state(moe), torch.get_rng_state()
    np.testing.assert_array_equal(measure(moe), expected)
    assert state(moe) == before
    assert torch.equal(torch.get_rng_state(), random)
    with torch.inference_mode():
        np.testing.assert_allclose(measure(moe), expected, atol=2e-5)
    assert state(moe) == before


class Interrupted(BaseException):
    """As Ctrl-C is, no Exception."""


@pytest.mark.parametrize(
    ("name", "after"),
    # by branches the last block runs once, in the plain pass
    [(name, 0) for name in MEASUREMENTS]
    + [(name, 2) for name in ("isolate_experts", "score_routes naively", "verify")],
)
def test_an_interruption_gives_the_modes_back(name: str, after: int) -> None:
    moe = noisy("qwen3_moe")
    train_partly(moe)
    with_gradients(moe)
    calls = 0

    def interrupt(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Interrupted

    handle = moe.spec(moe.layers[-1]).container.register_forward_pre_hook(interrupt)
    before, hooks = state(moe), list(moe.bridge.hook_dict)
    with pytest.raises(Interrupted):
        MEASUREMENTS[name](moe)
    handle.remove()
    assert state(moe) == before
    assert list(moe.bridge.hook_dict) == hooks
    assert not any(point.has_hooks() for point in moe.bridge.hook_dict.values())


def test_generation_of_the_testbed_is_in_eval_mode() -> None:
    model, tokenizer = tiny.build_hf("phimoe"), tiny.tiny_tokenizer()
    expected = complete(model, tokenizer, ["w3 w4"], max_new_tokens=4)
    model.train()
    model.lm_head.training = False
    assert complete(model, tokenizer, ["w3 w4"], max_new_tokens=4) == expected
    assert model.training
    assert not model.lm_head.training


def test_what_is_no_model_is_refused_in_its_own_words() -> None:
    with pytest.raises(mi.MoEInterpError):
        mi.score_routes(None, TOKENS, 0, torch.zeros(2, 7, 1, 2, dtype=torch.long))  # type: ignore[arg-type]
    with pytest.raises(mi.MoEInterpError, match="in place of its hooks"):
        mi.isolate_experts(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"), items())  # type: ignore[arg-type]
