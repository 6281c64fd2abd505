"""What MoEHooks answers about a model: layers, names, filters and the cells of a sweep."""

from __future__ import annotations

import itertools

import pytest

from moe_interp.hooks.attach import MoEHooks, attach
from tests import tiny


@pytest.fixture(scope="module")
def moe() -> MoEHooks:
    return attach(tiny.build_bridge(tiny.build_hf("qwen2_moe"), "qwen2_moe"))  # layer 0 is dense


def test_names_and_filters(moe: MoEHooks) -> None:
    assert moe.layers == (1, 2)
    assert moe.hook_name("expert_out", 2) == "blocks.2.hook_expert_out"
    assert moe.hook_names(1) == [f"blocks.1.hook_{name}" for name in moe.hooks(1)]
    assert moe.hook_names() == moe.hook_names(1) + moe.hook_names(2)
    chosen = moe.filter("router_in", "expert_out", layers=[2])
    assert {name for name in moe.bridge.hook_dict if chosen(name)} == {
        "blocks.2.hook_router_in",
        "blocks.2.hook_expert_out",
    }
    assert {name for name in moe.bridge.hook_dict if moe.filter()(name)} == set(moe.hook_names())


@pytest.mark.parametrize("given, label", [(1, 1), (-1, 2), (-2, 1), ("2", 2), ("-1", 2)])
def test_layer_labels(moe: MoEHooks, given: int | str, label: int) -> None:
    assert moe.layer_label(given) == label


def test_specs_and_words(moe: MoEHooks) -> None:
    specs = list(moe)
    assert [spec.layer for spec in specs] == [1, 2]
    assert (specs[0].n_experts, specs[0].top_k, specs[0].d_model, specs[0].d_expert) == (8, 2, 32, 24)
    assert repr(moe) == "MoEHooks(qwen2_moe: 2 MoE layers, 8 experts, top-2)"


@pytest.mark.parametrize(
    "axes, ranges",
    [
        (("layer", "pos", "expert"), ((1, 2), range(3), range(8))),
        (("layer", "slot"), ((1, 2), range(2))),
        (("expert", "layer"), (range(8), (1, 2))),
        (("pos",), (range(3),)),
    ],
)
def test_the_cells_of_a_patching_sweep(moe: MoEHooks, axes: tuple[str, ...], ranges: tuple[range, ...]) -> None:
    cells = moe.patch_index(axes, n_pos=3)
    assert list(cells.columns) == list(axes)
    rows = list(cells.itertuples(index=False, name=None))
    assert len(rows) == len(set(rows))
    assert set(rows) == set(itertools.product(*ranges))
    if axes[0] == "layer":
        assert rows == list(itertools.product(*ranges))
