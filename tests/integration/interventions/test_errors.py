"""What interventions refuse, each with what was given, what was expected and what to do; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_interp.errors import ConfigError, HookError, MoEInterpError, RouteError
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.interventions import (
    ablate_experts,
    bias_router,
    force_experts,
    random_routing,
    set_routes,
    uniform_routing,
)
from tests import tiny
from tests.integration.interventions.support import LEFT, TOKENS, opened, plain, run, see

NAN = float("nan")
Build = Callable[[MoEHooks], Any]

REFUSED: list[tuple[Build, type[MoEInterpError], str]] = [
    (lambda moe: force_experts(moe, 1, 8), RouteError, r"expert id 8 at force_experts.*from 0 to 7.*Correct the id"),
    (lambda moe: force_experts(moe, 1, -1), RouteError, r"experts \[-1\] for force_experts. Expected: integers from 0"),
    (lambda moe: force_experts(moe, 1, [3, -1]), RouteError, r"experts \[3, -1\].*set_routes takes -1 for an empty"),
    (lambda moe: force_experts(moe, 1, 1.5), RouteError, r"experts \[1.5\] for force_experts. Expected: integers"),
    (lambda moe: force_experts(moe, 1, [2, 2]), RouteError, r"expert 2 twice.*at most once a token. Remove the dupl"),
    (lambda moe: force_experts(moe, 1, []), ConfigError, r"no experts for force_experts.*0 to 7. Name at least one"),
    (
        lambda moe: force_experts(moe, 1, 2, mass="two"),
        ConfigError,
        r"mass='two'. Expected: \"one\" or \"natural\". Use",
    ),
    (
        lambda moe: force_experts(moe, 1, [2, 3], weights=[1.0]),
        ConfigError,
        r"2 experts and 1 weights.*as many weights",
    ),
    (lambda moe: force_experts(moe, 1, 2, weights=1.0, mass="natural"), ConfigError, r"mass='natural'.*leave mass out"),
    (lambda moe: uniform_routing(moe, mass="all"), ConfigError, r"mass='all'"),
    (lambda moe: set_routes(moe, 1, [0, 9]), RouteError, r"expert id 9 at set_routes.*-1 for an empty slot"),
    (lambda moe: set_routes(moe, 1, [0, -2]), RouteError, r"expert id -2 at set_routes"),
    (lambda moe: set_routes(moe, 1, [[4, 4]]), RouteError, r"expert 4 twice in the route of position 0 at set_routes"),
    (lambda moe: set_routes(moe, 1, [0.0, 1.0]), RouteError, r"dtype torch.float32.*integers \[slot\], \[pos, slot\]"),
    (lambda moe: set_routes(moe, 1, torch.zeros(1, 1, 1, 1).long()), RouteError, r"shape \(1, 1, 1, 1\).*Pass expert"),
    (
        lambda moe: set_routes(moe, 1, [0, 1], weights=[1.0]),
        RouteError,
        r"weights of shape \(1,\) for routes of shape \(2,\). Expected: one weight a slot. Give both the same shape",
    ),
    (lambda moe: bias_router(moe, 1, [0.0] * 7), ConfigError, r"bias of shape \(7,\). Expected: 8 numbers, one an exp"),
    (
        lambda moe: bias_router(moe, 1, [NAN] * 8),
        ConfigError,
        r"bias of shape \(8,\) with NaN.*Give each expert a bias",
    ),
    (lambda moe: ablate_experts(moe, 1, 8), RouteError, r"expert id 8 at ablate_experts"),
    (lambda moe: ablate_experts(moe, 1, -1), RouteError, r"experts \[-1\] for ablate_experts"),
    (lambda moe: ablate_experts(moe, 1, []), ConfigError, r"no experts for ablate_experts"),
    (
        lambda moe: ablate_experts(moe, 1, 2, mode="none"),  # type: ignore[arg-type]
        ConfigError,
        r"mode='none'. Expected: one of zero, mean, resample, reroute. Correct the mode",
    ),
    (
        lambda moe: ablate_experts(moe, 1, range(7), mode="reroute"),
        ConfigError,
        r"1 experts left of 8. Expected: at least the 2 that a token uses. Ablate fewer experts, or use mode='zero'",
    ),
    (lambda moe: random_routing(moe, positions="last"), ConfigError, r"positions='last'"),  # type: ignore[arg-type]
    (lambda moe: random_routing(moe, attention_mask=torch.ones(3)), ConfigError, r"attention mask of shape \(3,\)"),
]


@pytest.mark.parametrize(("build", "error", "text"), REFUSED, ids=[text[:30] for _, _, text in REFUSED])
def test_what_makes_no_sense_is_refused_when_it_is_built(build: Build, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build(opened("olmoe").moe)


def test_layers_that_are_dense_or_do_not_exist_are_refused_by_every_intervention() -> None:
    moe = opened("qwen2_moe").moe  # layer 0 is dense
    for layer in (0, 7, ("encoder", 1)):
        builds: list[Build] = [
            lambda moe, at=layer: force_experts(moe, at, 0),
            lambda moe, at=layer: set_routes(moe, at, [0]),
            lambda moe, at=layer: ablate_experts(moe, at, 0),
            lambda moe, at=layer: bias_router(moe, at, [0.0] * 8),
            lambda moe, at=layer: uniform_routing(moe, [at]),
            lambda moe, at=layer: random_routing(moe, [at]),
        ]
        for build in builds:
            with pytest.raises(HookError, match=r"layer .*, which (is not attached, or is dense|does not exist)"):
                build(moe)


def test_ablations_that_need_expert_outputs_say_so() -> None:
    with attach(tiny.build_bridge(opened("olmoe").hf, "olmoe"), expert_outputs=False) as moe:
        assert ablate_experts(moe, 1, 0)
        for mode in ("mean", "resample"):
            with pytest.raises(
                HookError, match=r"hook 'expert_out' at layer 1: the model was attached with expert_out"
            ):
                ablate_experts(moe, 1, 0, mode=mode)


def test_what_does_not_fit_the_pass_is_refused_when_it_runs_and_leaves_the_model_as_it_was() -> None:
    model = opened("olmoe")
    moe, before = model.moe, plain(model)
    wrong = {
        r"routes of shape \(5, 2\) for a pass of 2 x 6 tokens.*broadcasts to \[2, 6, slot\].*one a token": (
            RouteError,
            set_routes(moe, 1, [[0, 1]] * 5),
        ),
        r"routes of shape \(3, 6, 1\) for a pass of 2 x 6": (
            RouteError,
            set_routes(moe, 1, torch.zeros(3, 6, 1).long()),
        ),
        r"mask of 3 x 6 for a pass of 2 x 6": (
            ConfigError,
            force_experts(moe, 1, 0, attention_mask=torch.ones(3, 6)),
        ),
        r"mask of 2 x 7 for a pass of 2 x 6": (
            ConfigError,
            uniform_routing(moe, attention_mask=torch.ones(2, 7)),
        ),
        r"wrote inf to blocks.1.hook_expert_weights.*finite values": (
            RouteError,
            set_routes(moe, 1, [0], weights=[float("inf")]),
        ),
        r"the edited router of layer 1 gives weight nan.*finite weights": (
            RouteError,
            bias_router(moe, 1, [float("-inf")] * 8),
        ),
    }
    for text, (error, hooks) in wrong.items():
        with pytest.raises(error, match=text):
            run(model, hooks)
        assert torch.equal(plain(model), before)


def test_activations_without_a_batch_axis_are_refused() -> None:
    model = opened("olmoe")
    with pytest.raises(HookError, match=r"shape \(6, 2\), without its batch axis.*Run without remove_batch_dim"):
        run(model, force_experts(model.moe, 1, 0), TOKENS[:1], remove_batch_dim=True)


def test_numbers_of_numpy_and_tensors_are_taken() -> None:
    model = opened("olmoe")

    def experts(hooks: Any) -> Tensor:
        return see(model, hooks, 1)[1]["expert_indices"]

    moe = model.moe
    for one in (np.int64(3), torch.tensor(3), np.array([3]), (3,), range(3, 4)):
        assert torch.equal(experts(force_experts(moe, 1, one)), experts(force_experts(moe, 1, 3)))
        assert torch.equal(
            experts(ablate_experts(moe, 1, one, "reroute")), experts(ablate_experts(moe, 1, 3, "reroute"))
        )
    weighted = see(model, force_experts(moe, 1, np.array([3, 4]), weights=np.array([0.5, 2.0])), 1)[1]
    assert weighted["expert_weights"][0, 0].tolist() == [0.5, 2.0]
    mask = LEFT.numpy()
    assert torch.equal(
        experts(force_experts(moe, 1, 3, positions=np.array([0]), attention_mask=mask)),
        experts(force_experts(moe, 1, 3, positions=[0], attention_mask=LEFT)),
    )
    assert torch.equal(
        run(model, bias_router(moe, 1, np.arange(8.0))), run(model, bias_router(moe, 1, torch.arange(8)))
    )
