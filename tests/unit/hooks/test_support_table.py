"""The support table: complete, made from the families and the hooks, and printed in the documentation."""

from __future__ import annotations

from pathlib import Path

import moe_interp as mi
from moe_interp.arch.families import FAMILIES
from moe_interp.hooks.names import HOOKS, hooks_of
from moe_interp.hooks.support_table import support_markdown
from moe_interp.hooks.transformer_lens_hooks import TRANSFORMER_LENS_HOOKS

ROOT = Path(__file__).resolve().parents[3]


def test_every_family_and_every_hook_has_a_row() -> None:
    table = mi.support_table()
    expected = [(family.name, hook.name) for family in FAMILIES for hook in HOOKS]
    assert list(zip(table["family"], table["hook"])) == expected
    assert set(", ".join(table["architectures"].unique()).split(", ")) == {a for f in FAMILIES for a in f.architectures}
    assert (table["write"].str.len() > 0).all()


def test_presence_is_that_of_the_hooks_and_absence_says_why() -> None:
    table = mi.support_table().set_index(["family", "hook"])
    for family in FAMILIES:
        served = hooks_of(family, has_shared=family.has_shared)
        for hook in HOOKS:
            row = table.loc[(family.name, hook.name)]
            assert row["present"] == ("yes" if hook.name in served else "no")
    assert table.loc[("gpt_oss", "router_probs"), "write"].startswith("gpt_oss selects by its logits")
    assert "no shared experts" in table.loc[("mixtral", "shared_out"), "write"]
    assert "already weighted" in table.loc[("llama4", "expert_out"), "write"]


def test_transformer_lens_own_hooks_are_listed_with_their_shapes() -> None:
    table = mi.support_table().set_index(["family", "hook"])["transformer_lens"]
    assert table["olmoe", "expert_weights"] == "mlp.gate.hook_expert_weights [token expert]"
    assert table["olmoe", "expert_indices"] == "mlp.gate.hook_expert_indices [token slot]"
    assert table["granite_moe", "router_logits"] == "mlp.gate.hook_expert_indices [token expert]"
    assert set(TRANSFORMER_LENS_HOOKS) == {family.name for family in FAMILIES}


def test_the_documented_table_is_up_to_date() -> None:
    page = (ROOT / "docs/support.md").read_text(encoding="utf-8")
    assert page == support_markdown(), "run: moe-interp support --markdown > docs/support.md"
    for name in [f.name for f in FAMILIES] + [a for f in FAMILIES for a in f.architectures]:
        assert name in page
