"""Single neurons of an expert held at a value, in whichever slot the expert stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_interp.errors import ConfigError, HookError, MoEInterpError, RouteError
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.interventions import ablate_neurons, clamp_neurons, force_experts, promote_experts
from tests import tiny
from tests.integration.hooks.support import assert_moved, assert_near
from tests.integration.interventions.support import opened, run, see

EXPERT, HELD, VALUES = 3, [1, 4], torch.tensor([2.0, -1.0])
POST = ("expert_indices", "expert_post", "expert_out")


def test_held_neurons_are_those_of_the_expert_in_every_slot(family: str) -> None:
    """Its other neurons, and other experts, are untouched; its output moves as its second map says."""
    model = opened(family)
    layer = model.last
    use = promote_experts(model.moe, layer, EXPERT, positions=[0, 3])
    seen, before = (
        see(model, [*use, *more], layer, *POST)[1]
        for more in (clamp_neurons(model.moe, layer, EXPERT, HELD, VALUES), [])
    )
    spot = seen["expert_indices"] == EXPERT
    assert spot.any(-1)[:, [0, 3]].all()
    assert (seen["expert_post"][spot][:, HELD] == VALUES).all()
    others = [n for n in range(seen["expert_post"].shape[-1]) if n not in HELD]
    assert torch.equal(seen["expert_post"][..., others], before["expert_post"][..., others])
    assert torch.equal(seen["expert_out"][~spot], before["expert_out"][~spot])
    # the second map is affine: twice the change of the neurons is twice the change of the output
    twice = 2 * VALUES - before["expert_post"][spot][:1, HELD][0]
    moved = seen["expert_out"][spot][0] - before["expert_out"][spot][0]
    far = see(model, [*use, *clamp_neurons(model.moe, layer, EXPERT, HELD, twice)], layer, *POST)[1]
    assert_near(far["expert_out"][spot][0] - before["expert_out"][spot][0], 2 * moved, 2e-5)
    assert_moved(moved, torch.zeros_like(moved))


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "llama4", "nemotron_h", "jetmoe"])
def test_an_expert_without_neurons_is_one_that_gives_its_bias_alone(name: str) -> None:
    model = opened(name)
    spec = model.moe.spec(model.last)
    alone = force_experts(model.moe, model.last, EXPERT)
    every = ablate_neurons(model.moe, model.last, EXPERT, range(spec.d_expert))
    out = see(model, [*alone, *every], model.last, "expert_out")[1]["expert_out"].flatten(0, 2)
    bias = model.native[model.last].block.experts.down_proj_bias[EXPERT] if name == "gpt_oss" else torch.zeros(1)
    assert_near(out, bias.detach().expand_as(out))
    one, zero = (
        [*alone, *f(model.moe, model.last, EXPERT, 2, *v)] for f, v in ((ablate_neurons, ()), (clamp_neurons, (0.0,)))
    )
    assert torch.equal(run(model, one), run(model, zero))
    # of two values for a neuron the later one holds
    later = [
        *alone,
        *clamp_neurons(model.moe, model.last, EXPERT, 2, 5.0),
        *ablate_neurons(model.moe, model.last, EXPERT, 2),
    ]
    assert torch.equal(run(model, later), run(model, one))


Build = Callable[[MoEHooks], Any]
REFUSED: list[tuple[Build, type[MoEInterpError], str]] = [
    (lambda moe: ablate_neurons(moe, 1, 8, 0), RouteError, r"expert id 8 at ablate_neurons"),
    (lambda moe: ablate_neurons(moe, 1, [2, 3], 0), ConfigError, r"experts \[2, 3\] for ablate_neurons. .*one expert"),  # type: ignore[arg-type]
    (lambda moe: ablate_neurons(moe, 9, 2, 0), HookError, r"layer 9, which does not exist"),
    (
        lambda moe: ablate_neurons(moe, 1, 2, moe.spec(1).d_expert),
        ConfigError,
        r"for ablate_neurons.*integers from 0 to \d+. Name neu",
    ),
    (lambda moe: ablate_neurons(moe, 1, 2, -1), ConfigError, r"neurons -1"),
    (lambda moe: ablate_neurons(moe, 1, 2, []), ConfigError, r"neurons \[\]"),
    (lambda moe: ablate_neurons(moe, 1, 2, [3, 3]), ConfigError, r"different integers"),
    (lambda moe: ablate_neurons(moe, 1, 2, 1.5), ConfigError, r"neurons 1.5"),  # type: ignore[arg-type]
    (lambda moe: clamp_neurons(moe, 1, 2, [0, 1, 2], [1.0, 2.0]), ConfigError, r"for 3 neurons.*finite number, or one"),
    (lambda moe: clamp_neurons(moe, 1, 2, 0, float("inf")), ConfigError, r"value=inf for 1 neurons"),
    (lambda moe: clamp_neurons(moe, 1, 2, 0, "much"), ConfigError, r"value=much"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("build", "error", "text"), REFUSED, ids=[text[:30] for _, _, text in REFUSED])
def test_what_is_not_there_is_refused_when_it_is_built(build: Build, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build(opened("olmoe").moe)


def test_neurons_that_cannot_be_read_say_so() -> None:
    model = opened("olmoe")
    moe = attach(tiny.build_bridge(model.hf, "olmoe"), expert_outputs=False)
    with pytest.raises(HookError, match=r"hook 'expert_post' at layer 1: the model was attached with expert_out"):
        ablate_neurons(moe, 1, 0, 0)
