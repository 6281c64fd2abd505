"""Every intervention touches the tokens it is given, and no other: positions, padding, samples, steps of generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.interventions import (
    ablate_experts,
    bias_router,
    change_top_k,
    clamp_neurons,
    force_experts,
    promote_experts,
    random_routing,
    replay_routes,
    router_temperature,
    routes_from,
    set_routes,
    suppress_experts,
    swap_experts,
    uniform_routing,
)
from moe_interp.types import Hooks
from tests import tiny
from tests.integration.hooks.support import assert_near
from tests.integration.interventions.support import (
    LEFT,
    RIGHT,
    TOKENS,
    Opened,
    opened,
    plain,
    routes_in_generation,
    run,
    same,
    see,
)

# biases are given to families that rank by more than logits; test_bias_limits.py is about what they cannot do there
pytestmark = pytest.mark.filterwarnings("ignore::moe_interp.interventions.router.BiasLimitWarning")

Intervention = Callable[..., Hooks]
SOME = ("olmoe", "llama4", "deepseek_v3", "jetmoe")


def recorded_elsewhere(model: Opened, **where: Any) -> Hooks:
    names = model.moe.filter("expert_indices", "expert_weights")
    with torch.no_grad():
        cache = model.bridge.run_with_cache(tiny.random_tokens(8, 20, seed=7), names_filter=names)[1]
    return replay_routes(model.moe, cache, [model.last], **where)


def taken_from_elsewhere(model: Opened, **where: Any) -> Hooks:
    tokens = tiny.random_tokens(8, 20, seed=8)
    names = model.moe.filter("expert_indices", "expert_weights")
    with torch.no_grad():
        cache = model.bridge.run_with_cache(tokens, names_filter=names)[1]
    return routes_from(model.moe, cache, [model.last], source_mask=torch.ones_like(tokens), **where)


def ablated_by_reference(model: Opened, mode: Any, **where: Any) -> Hooks:
    reference = tiny.random_tokens(8, 20, seed=7)
    return ablate_experts(model.moe, model.last, range(8), mode=mode, seed=2, reference=reference, **where)


INTERVENTIONS: dict[str, Intervention] = {
    "one": lambda m, **where: force_experts(m.moe, m.last, 7, **where),
    "natural": lambda m, **where: force_experts(m.moe, m.last, 7, mass="natural", **where),
    "several": lambda m, **where: force_experts(m.moe, m.last, [7, 0, 3], **where),
    "weighted": lambda m, **where: set_routes(m.moe, m.last, [7, -1, 0], [0.3, 0.0, 0.9], **where),
    "uniform": lambda m, **where: uniform_routing(m.moe, [m.last], **where),
    "uniform natural": lambda m, **where: uniform_routing(m.moe, [m.last], mass="natural", **where),
    "random": lambda m, **where: random_routing(m.moe, [m.last], seed=5, **where),
    "biased": lambda m, **where: bias_router(m.moe, m.last, [3.0, -3, 3, -3, 3, -3, 3, -3], **where),
    "replayed": recorded_elsewhere,
    "zero": lambda m, **where: ablate_experts(m.moe, m.last, [0, 1, 2, 3, 4, 5, 6, 7], **where),
    "mean": lambda m, **where: ablated_by_reference(m, "mean", **where),
    "resample": lambda m, **where: ablated_by_reference(m, "resample", **where),
    "reroute": lambda m, **where: ablate_experts(m.moe, m.last, [0, 2, 4, 6], mode="reroute", **where),
    "promoted": lambda m, **where: promote_experts(m.moe, m.last, 7, **where),
    "suppressed": lambda m, **where: suppress_experts(m.moe, m.last, [0, 2, 4, 6], **where),
    "top k": lambda m, **where: change_top_k(m.moe, m.last, 3 - m.moe.spec(m.last).top_k, **where),
    "temperature": lambda m, **where: router_temperature(m.moe, m.last, 3.0, **where),
    "swapped": lambda m, **where: [
        hook for a, b in ((0, 4), (1, 5), (2, 6), (3, 7)) for hook in swap_experts(m.moe, m.last, a, b, **where)
    ],
    "neurons": lambda m, **where: [
        hook for e in range(8) for hook in clamp_neurons(m.moe, m.last, e, [0, 3], 2.0, **where)
    ],
    "from elsewhere": taken_from_elsewhere,
}


EVERY = torch.ones_like(LEFT, dtype=torch.bool)


def moved(model: Opened, hooks: Hooks, meant: Tensor, **inputs: Any) -> Tensor:
    """``[batch, pos]``: whose routed output changed; tokens not meant must keep their route bit for bit."""
    names = ("expert_indices", "expert_weights", "routed_out")
    before, after = (see(model, h, model.last, *names, **inputs)[1] for h in ([], hooks))
    changed = ((before["routed_out"] - after["routed_out"]).abs() > 1e-5).any(-1)
    assert same(before, after, EVERY & ~meant)
    assert not (changed & ~meant).any()
    return changed


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_untouched_tokens_keep_their_routes_bit_for_bit(kind: str, name: str) -> None:
    model, intervene = opened(name), INTERVENTIONS[kind]
    possible = moved(model, intervene(model), EVERY)
    assert possible.float().mean() > 0.4
    column = torch.arange(TOKENS.shape[1])
    for positions, meant in (([1, -2], (column == 1) | (column == 4)), ("new", column < 0), ("all", column >= 0)):
        found = moved(model, intervene(model, positions=positions), meant)
        assert torch.equal(found, possible & meant), positions


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_padding_is_untouched_and_positions_count_real_tokens(kind: str, side: str) -> None:
    model, intervene = opened("olmoe"), INTERVENTIONS[kind]
    mask = LEFT if side == "left" else RIGHT
    inputs = {"attention_mask": mask}
    everywhere = moved(model, intervene(model, attention_mask=mask), mask.bool(), **inputs)
    assert everywhere.any()
    index = mask.cumsum(-1) - 1
    lengths = mask.sum(-1, keepdim=True)
    for positions, meant in (([0, 3], (index == 0) | (index == 3)), ([-1], index == lengths - 1)):
        hooks = intervene(model, positions=positions, attention_mask=mask)
        found = moved(model, hooks, meant & mask.bool(), **inputs)
        if kind != "replayed":
            assert torch.equal(found, everywhere & meant)


def test_padded_and_unpadded_prompts_come_out_alike() -> None:
    """The real tokens of a padded row against the row alone, under interventions that are the same for every row."""
    for name in ("olmoe", "gpt_oss", "llama4"):
        model = opened(name)
        for kind in ("one", "natural", "several", "uniform natural", "biased", "zero", "reroute"):
            for mask in (LEFT, RIGHT):
                positions = [0, 2, -1]
                padded = run(
                    model,
                    INTERVENTIONS[kind](model, positions=positions, attention_mask=mask),
                    attention_mask=mask,
                )
                real = mask[0].bool()
                alone = run(model, INTERVENTIONS[kind](model, positions=positions), TOKENS[:1, real])
                assert_near(padded[0, real], alone[0], 2e-5, (name, kind))


def test_a_prompts_mask_serves_all_its_samples() -> None:
    model = opened("olmoe")
    tokens, mask = TOKENS.repeat_interleave(3, 0), LEFT.repeat_interleave(3, 0)
    inputs = {"tokens": tokens, "attention_mask": mask}
    for positions in (None, [0, -1], "all"):
        short, long = (
            see(model, force_experts(model.moe, 1, 7, positions=positions, attention_mask=m), 1, **inputs)[1]
            for m in (LEFT, mask)
        )
        assert torch.equal(short["expert_indices"], long["expert_indices"])
    draws = see(model, random_routing(model.moe, [1], attention_mask=LEFT), 1, **inputs)[1]["expert_indices"]
    assert not torch.equal(draws[3], draws[4])  # each sample has draws of its own


def test_hooks_and_run_with_hooks_and_run_with_cache_agree() -> None:
    model = opened("olmoe")
    hooks = [*random_routing(model.moe, [0], seed=1), *force_experts(model.moe, 1, 3, positions=[2])]
    expected = run(model, hooks)
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
        assert torch.equal(model.bridge(TOKENS), expected)
        names = model.moe.filter("expert_indices", "expert_weights")
        logits, cache = model.bridge.run_with_cache(TOKENS, names_filter=names)
    assert torch.equal(logits, expected)
    assert cache["expert_indices", 1][:, 2].tolist() == [[3, -1]] * 2
    assert cache["expert_weights", 1][:, 2].tolist() == [[1.0, 0.0]] * 2
    assert torch.equal(plain(model), run(model, []))


def test_layers_of_an_encoder_decoder_are_reached_by_their_labels() -> None:
    model = opened("switch_transformers")
    for layer in model.labels:
        for positions in (None, [1, -1]):
            seen = see(model, force_experts(model.moe, layer, 6, positions=positions), layer)[1]["expert_indices"]
            native = see(model, [], layer)[1]["expert_indices"]
            there = torch.ones(6, dtype=torch.bool) if positions is None else torch.arange(6) % 4 == 1
            assert (seen[:, there] == 6).all()
            assert torch.equal(seen[:, ~there], native[:, ~there])
    short = TOKENS[:, :3]
    with torch.no_grad():  # three decoder positions beside six of the encoder
        hooks = [h for layer in model.labels for h in uniform_routing(model.moe, [layer], positions=[-1])]
        names = model.moe.filter("expert_indices")
        with model.bridge.hooks(fwd_hooks=hooks):
            cache = model.bridge.run_with_cache(TOKENS, decoder_input_ids=short, names_filter=names)[1]
    for layer in model.labels:
        widths = (model.moe.cached(cache, "expert_indices", layer) >= 0).sum(-1)
        assert (widths[:, -1] == 8).all()
        assert (widths[:, :-1] <= 1).all()


# --- generate -------------------------------------------------------------------------------------------------

WANTED: list[tuple[Any, list[str]]] = [
    (None, ["xxxxxx", ".", ".", "."]),
    ("all", ["xxxxxx", "x", "x", "x"]),
    ("new", ["......", "x", "x", "x"]),
    ([0, 4], ["x...x.", ".", ".", "."]),
    ([-1], [".....x", ".", ".", "."]),
    ([5, 7], [".....x", ".", "x", "."]),
]


def forced(steps: list[Tensor], expert: int) -> list[list[str]]:
    """For each row and step, which tokens used this expert and no other."""
    rows = []
    for row in range(len(steps[0])):
        alone = [(s[row, :, 0] == expert) & (s[row, :, 1:] < 0).all(-1) for s in steps]
        rows.append(["".join("x" if t else "." for t in step.tolist()) for step in alone])
    return rows


@pytest.mark.parametrize(("positions", "expected"), WANTED, ids=[str(positions) for positions, _ in WANTED])
def test_positions_under_generate_with_a_cache(positions: Any, expected: list[str]) -> None:
    for name in ("olmoe", "qwen3_next", "llama4"):
        model = opened(name)
        hooks = force_experts(model.moe, model.last, 7, positions=positions)
        assert forced(routes_in_generation(model, hooks, model.last, 4), 7) == [expected] * 2


def test_positions_of_a_left_padded_prompt_under_generate() -> None:
    model = opened("olmoe")
    for positions, expected in [
        (None, [["..xxxx", ".", "."], ["xxxxxx", ".", "."]]),
        ("all", [["..xxxx", "x", "x"], ["xxxxxx", "x", "x"]]),
        ("new", [["......", "x", "x"], ["......", "x", "x"]]),
        ([0, -1], [["..x..x", ".", "."], ["x....x", ".", "."]]),
        ([5], [["......", ".", "x"], [".....x", ".", "."]]),
    ]:
        for cached in (True, False):
            hooks = force_experts(model.moe, 2, 7, positions=positions, attention_mask=LEFT)
            options = {"attention_mask": LEFT, "use_past_kv_cache": cached}
            steps = routes_in_generation(model, hooks, 2, 3, **options)
            if not cached:  # every step is a whole pass; the last holds them all
                steps = list(steps[-1].split([6, 1, 1], dim=1))
            assert forced(steps, 7) == expected, (positions, cached)


def test_generation_with_and_without_a_cache_takes_the_same_tokens() -> None:
    """Under an intervention at all positions, a step from the cache continues what a whole pass computes."""
    for name in ("olmoe", "deepseek_v3", "llama4"):
        model = opened(name)
        for kind in ("one", "uniform natural", "random", "biased", "reroute"):
            found = []
            for cached in (True, False):
                with torch.no_grad(), model.bridge.hooks(fwd_hooks=INTERVENTIONS[kind](model, positions="all")):
                    found.append(
                        model.bridge.generate(
                            TOKENS, max_new_tokens=3, do_sample=False, verbose=False, use_past_kv_cache=cached
                        )
                    )
            assert torch.equal(*found), (name, kind)


def test_routes_given_by_position_serve_the_prompt_under_generate() -> None:
    model = opened("olmoe")
    routes = torch.stack([torch.arange(6), torch.arange(6) + 1], dim=-1)
    weights = torch.full((6, 2), 0.5)
    steps = routes_in_generation(model, set_routes(model.moe, 1, routes, weights), 1, 3)
    assert torch.equal(steps[0], routes.expand(2, 6, 2))
    assert [step.shape for step in steps[1:]] == [(2, 1, 2)] * 2


def test_a_pass_after_generation_starts_anew() -> None:
    model = opened("olmoe")
    hooks = force_experts(model.moe, 1, 7)
    routes_in_generation(model, hooks, 1, 3)
    assert (see(model, hooks, 1)[1]["expert_indices"] == 7).all()
