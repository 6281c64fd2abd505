"""The table of hooks, and what a layer of each kind has."""

from __future__ import annotations

import pytest

from moe_interp.arch.families import FAMILIES
from moe_interp.hooks.names import HOOK_NAMES, HOOKS, absence, hooks_of

BY_NAME = {family.name: family for family in FAMILIES}
ORDER = (
    *("router_in", "router_logits", "router_probs", "expert_indices", "expert_weights"),
    *("expert_post", "expert_out", "routed_out", "shared_out"),
)


def test_the_table_is_the_contract_in_the_order_of_firing() -> None:
    assert HOOK_NAMES == ORDER
    assert {hook.axes.split()[0] for hook in HOOKS} == {"batch"}
    assert {hook.axes.split()[1] for hook in HOOKS} == {"pos"}
    assert [hook.axes.split()[2:] for hook in HOOKS] == [
        *(["d_model"], ["expert"], ["expert"], ["slot"], ["slot"]),
        *(["slot", "d_expert"], ["slot", "d_model"], ["d_model"], ["d_model"]),
    ]


@pytest.mark.parametrize(
    "family, has_shared, missing",
    [
        ("olmoe", False, {"shared_out"}),
        ("qwen2_moe", True, set()),
        ("gpt_oss", False, {"router_probs", "shared_out"}),
        ("phimoe", False, {"router_probs", "shared_out"}),
        ("llama4", True, {"router_probs"}),
        ("deepseek_v3", True, set()),
    ],
)
def test_a_layer_has_the_hooks_it_can_serve(family: str, has_shared: bool, missing: set[str]) -> None:
    present = hooks_of(BY_NAME[family], has_shared=has_shared)
    assert present == tuple(name for name in ORDER if name not in missing)
    narrow = hooks_of(BY_NAME[family], has_shared=has_shared, expert_outputs=False)
    assert narrow == tuple(name for name in present if name not in ("expert_post", "expert_out"))


def test_every_absence_has_a_reason() -> None:
    olmoe, gpt_oss = BY_NAME["olmoe"], BY_NAME["gpt_oss"]
    assert absence("shared_out", olmoe) == "this layer of olmoe has no shared experts"
    assert absence("router_probs", gpt_oss).startswith("gpt_oss selects by its logits")
    assert absence("expert_post", olmoe) == "the model was attached with expert_outputs=False"
    assert absence("resid_pre", olmoe) == "no hook is called 'resid_pre'"
