"""What ``moe-interp isolate`` writes of a result, also where it is too small for a statistic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moe_interp as mi
from moe_interp.cli.inputs import first_of_each, read_items
from moe_interp.cli.options import inputs
from moe_interp.cli.outputs import write_isolation
from moe_interp.errors import ConfigError
from moe_interp.experiments.inputs.items import Item
from moe_interp.plots import FIGURES
from moe_interp.report import isolation_page
from tests.unit.experiments.planted_isolation import planted_isolation

SMALL: list[tuple[dict[str, Any], set[str], str]] = [
    ({}, set(), "16 tests: 2 domains x 2 layers x 4 experts"),
    ({"n_items": {"math": 12}}, set(), "Specialization between domains: not testable, the single domain 'math'"),
    ({"n_items": {"facts": 1, "math": 12}}, {"layer_impact"}, "at least 6 are needed: facts"),
    ({"n_items": {"facts": 1}}, {"layer_impact", "sorted_p"}, "Too few items for any test"),
    ({"n_experts": 2}, {"calibration"}, "Calibration: not testable, 2 experts"),
    ({"n_experts": 1}, {"calibration"}, "Calibration: not testable, 1 experts"),
    ({"n_layers": 1}, set(), "not testable, there are not layers of both kinds"),
    ({"mode": "ablate", "n_items": {"a": 5, "b": 6}, "masses": ("natural",)}, set(), "Ablation of 4 experts"),
]


@pytest.mark.parametrize(("options", "missing", "text"), SMALL, ids=[text[-30:] for _, _, text in SMALL])
def test_what_cannot_be_computed_is_said_and_all_the_rest_is_written(
    tmp_path: Path, options: dict[str, Any], missing: set[str], text: str
) -> None:
    tiny = {"n_layers": 2, "n_experts": 4, "n_items": {"facts": 8, "math": 8}}
    result = planted_isolation(**(tiny | options))
    (tmp_path / "figures").mkdir()
    for name in missing:
        (tmp_path / "figures" / f"{name}.svg").write_text("of an earlier run")
    write_isolation(result, tmp_path)
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == set(FIGURES["isolation"]) - missing
    assert "<svg" in isolation_page(result)
    assert mi.load_result(tmp_path / "isolation.nc").data.identical(result.data)
    assert text in result.summary()


def test_items_are_kept_by_domain_and_number() -> None:
    items = [Item(str(i), "ab"[i % 2], "p", "q") for i in range(6)]
    assert [item.id for item in first_of_each(items, 2)] == ["0", "1", "2", "3"]
    assert first_of_each(items, None) == items
    bundled = read_items(["demo"], ["facts", "puzzles"], 3)
    assert [item.domain for item in bundled] == ["facts"] * 3 + ["puzzles"] * 3
    with pytest.raises(ConfigError, match="no items"):
        inputs("--items", None, "another", "id, domain, prompt, answer")
