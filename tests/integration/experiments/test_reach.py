"""Ablating what no token uses, or what cannot reach the answer, changes nothing at all; and the two are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe_interp as mi
from tests.integration.experiments.test_isolation import NAMED, ODD, QUIET, attached

FAMILIES = [*NAMED, *ODD, "minimax_m2", "lfm2_moe"]


def items_of(n: int = 5) -> list[dict[str, Any]]:
    """Short ones of several lengths, so that a batch is padded and experts are left without tokens."""
    rng = np.random.default_rng(3)
    lengths = [(1 + i % 4, 1 + i % 2) for i in range(n)]
    return [
        {
            "id": f"i{i}",
            "domain": "ab"[i % 2],
            "prompt": rng.integers(3, 90, p).tolist(),
            "answer": rng.integers(3, 90, a).tolist(),
        }
        for i, (p, a) in enumerate(lengths)
    ]


def routes_one_at_a_time(moe: mi.MoEHooks, item: dict[str, Any]) -> dict[int, Tensor]:
    """``[pos, slot]`` by layer, of the item run alone."""
    seen: dict[int, Tensor] = {}

    def reader(layer: int) -> Any:
        def read(value: Tensor, hook: Any) -> None:
            seen[layer] = value[0].clone()

        return read

    tokens = torch.tensor([item["prompt"] + item["answer"]])
    hooks = [(moe.hook_name("expert_indices", layer), reader(layer)) for layer in moe.layers]
    with torch.no_grad():
        moe.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_what_cannot_reach_the_answer_changes_nothing(name: str) -> None:
    moe, items = attached(name), items_of()
    data = mi.isolate_experts(moe, items, mode="ablate", baselines=["natural"], **QUIET).data
    last = len(moe.bridge.blocks) - 1
    n_out, n_unused = 0, 0
    for number, item in enumerate(items):
        for layer, route in routes_one_at_a_time(moe, item).items():
            answer_from = len(item["prompt"]) - 1 if layer == last else 0
            for expert in data["expert"].values.tolist():
                where = (route == expert).any(-1)
                at = {"item": number, "layer": data["layer"].values.tolist().index(layer)}
                delta = data["delta"].isel(at).sel(expert=expert).values
                uses, reaches = (bool(data[v].isel(at).values[expert]) for v in ("uses_item", "reaches_item"))
                assert uses == bool(where.any())
                assert reaches == bool(where[answer_from:-1].any())
                assert reaches or (delta == 0).all()
                n_out, n_unused = n_out + (uses and not reaches), n_unused + (not uses)
    assert n_out > 0
    assert n_unused > 0


@pytest.mark.parametrize("name", ["olmoe", "nemotron_h"])
@torch.no_grad()
def test_in_double_precision_it_is_rounding_that_was_left_out(name: str) -> None:
    """The public intervention, one item at a time, moves what is out of reach by no more than rounding."""
    moe, items = attached(name, torch.float64), items_of(4)
    data = mi.isolate_experts(moe, items, mode="ablate", baselines=["natural"], **QUIET).data
    moved = {True: [0.0], False: [0.0]}
    for number, item in enumerate(items):
        tokens, start = torch.tensor([item["prompt"] + item["answer"]]), len(item["prompt"])
        for place, layer in enumerate(moe.layers):
            for expert in range(moe.spec(layer).n_experts):
                scores = [
                    moe.bridge.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)[0, start - 1 : -1]
                    for hooks in ([], mi.ablate_experts(moe, layer, expert))
                ]
                change = float((scores[0] - scores[1]).abs().max())
                moved[bool(data["reaches_item"].values[number, place, expert])].append(change)
    assert max(moved[False]) < 1e-10 < 1e-3 < max(moved[True])


def test_a_hook_that_mixes_positions_extends_the_reach() -> None:
    """What differs by more than rounding is kept, whatever the model's own structure says."""
    moe, items = attached("olmoe"), [{"id": "x", "domain": "a", "prompt": [5, 17, 60, 33], "answer": [7]}]
    last = moe.layers[-1]

    def mix(value: Tensor, hook: Any) -> Tensor:
        return value + value.cumsum(1)

    with moe.bridge.hooks(fwd_hooks=[(f"blocks.{last}.hook_out", mix)]):
        fast = mi.isolate_experts(moe, items, layers=[last], mode="ablate", baselines=["natural"], **QUIET).data
        naive = mi.isolate_experts(
            moe, items, layers=[last], mode="ablate", baselines=["natural"], method="naive", **QUIET
        ).data
    used_before = fast["uses_item"].values[0, 0] & (np.abs(naive["delta"].values[0, 0, 0, 0]) > 1e-3)
    assert used_before.sum() > moe.spec(last).top_k  # more experts than the answer's prediction uses
    np.testing.assert_array_equal(fast["reaches_item"].values[0, 0] & used_before, used_before)
    np.testing.assert_allclose(fast["delta"], naive["delta"], atol=2e-5)


def test_the_table_tells_unused_and_out_of_reach_apart() -> None:
    moe = attached("olmoe")
    items = [{**item, "domain": "a"} for item in items_of(8)]
    result = mi.isolate_experts(moe, items, mode="ablate", experts=[0, 1, (2, 3)], baselines=["natural"], **QUIET)
    data = result.data.copy(deep=True)
    layer = data["layer"].values[0]
    for name in ("uses_item", "reaches_item"):
        data[name].loc[{"layer": layer, "routed_expert": 0}] = False  # never used
        data[name].loc[{"layer": layer, "routed_expert": [2, 3]}] = False
    data["uses_item"].loc[{"layer": layer, "routed_expert": 3}] = True  # used, out of reach
    data["delta"].loc[{"layer": layer, "expert": ["0", "2+3"]}] = 0.0
    changed = mi.IsolationResult(data)
    table = changed.specialization()
    here = table[table["layer"] == layer].set_index("expert")
    assert here["unused"].tolist() == [True, False, False]
    assert here["out_of_reach"].tolist() == [False, False, True]
    assert here.loc[["0", "2+3"], "p"].tolist() == [1.0, 1.0]
    assert table.attrs["unused"] == 1 + int(table[table["layer"] != layer]["unused"].sum())
    assert "used only where they cannot reach the answer" in changed.summary()
