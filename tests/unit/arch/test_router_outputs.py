"""What a router returns is read by place, so an order that is not the expected one is refused, never misread."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_interp.arch.families import FAMILIES
from moe_interp.arch.router_outputs import CappedTriple, DenseScores, OneHot, ScoresTriple, SortedPairs, Triple
from moe_interp.errors import RouteError

LOGITS = torch.randn(5, 8)
WEIGHTS, INDICES = torch.rand(5, 2), torch.randint(8, (5, 2))


class OldRouter(nn.Module):
    pass


@pytest.mark.parametrize("layout", [Triple(), CappedTriple(), ScoresTriple(), OneHot()])
@pytest.mark.parametrize(
    "out",
    [
        pytest.param((INDICES, WEIGHTS, LOGITS), id="ids first or last, where the family has them elsewhere"),
        pytest.param((LOGITS, WEIGHTS, WEIGHTS), id="no ids"),
        pytest.param(LOGITS, id="the logits alone"),
        pytest.param((LOGITS, INDICES), id="two"),
        pytest.param((LOGITS, WEIGHTS, [1, 2]), id="a list"),
    ],
)
def test_another_order_is_refused_by_name(layout: Triple | OneHot, out: object) -> None:
    if isinstance(layout, OneHot) and isinstance(out, tuple) and len(out) == 3 and out[0] is INDICES:
        out = (WEIGHTS, INDICES, LOGITS)  # its own order has ids first
    with pytest.raises(RouteError, match=r"OldRouter returns \(.*holds expert ids.*transformers 5\.21"):
        layout.read(OldRouter(), None, LOGITS, out)  # type: ignore[arg-type]  # refused before the rule is asked


def test_every_family_s_layout_is_one_of_those_that_check() -> None:
    """Llama 4 and JetMoE have no ids to check: theirs come from the rule."""
    checked = (Triple, OneHot)
    assert {type(f.layout) for f in FAMILIES if not isinstance(f.layout, checked)} <= {DenseScores, SortedPairs}
