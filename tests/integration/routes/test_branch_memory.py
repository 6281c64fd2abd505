"""What branches hold at a time: no more than the plan counts, in both layouts, and the whole within the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_interp.engine import policy
from moe_interp.engine.branches import BranchRunner, can_share_keys
from moe_interp.engine.grid.kernels import plain_kernel
from moe_interp.engine.grid.rows import GridRows, RowsOfSequence
from moe_interp.engine.grid.trial import can_run_grid
from moe_interp.engine.policy import GridShares
from moe_interp.engine.recorded_pass import RecordedPass, record_pass
from moe_interp.routes import check_routes, plan, score_from_base
from tests import tiny
from tests.integration.routes.helpers import attached, random_routes
from tests.memory import PeakBytes

POS, ROWS, SHARE = 60, 6, 0.15  # the estimates are upper ones, but not by a factor that hides a mistake of 8


def recorded(name: str) -> tuple[RecordedPass, int]:
    moe = attached(name)
    layer = moe.layers[0]
    assert isinstance(layer, int)
    base = record_pass(moe, tiny.random_tokens(1, POS), [layer])
    assert can_share_keys(base)
    assert can_run_grid(base)
    return base, layer


def peak(call: Any) -> int:
    with torch.no_grad(), PeakBytes() as held:
        call()
    return held.peak


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("shares_keys", [True, False])
def test_compact_rows(name: str, shares_keys: bool) -> None:
    base, layer = recorded(name)
    packed = plan.Plan(base, layer, 40, 2**24, 1, shares_keys)
    n = packed.row_length
    position = (torch.arange(n) % POS).expand(ROWS, n).contiguous()
    block_out = base.block_out(layer)[position]
    scores = plan._attention(base)[0] * n * POS  # of one row
    with BranchRunner(base, layer, 1, shares_keys, scores) as run:
        held = peak(lambda: run(torch.zeros(ROWS, dtype=torch.int64), position, block_out))
    counted = ROWS * packed._row_bytes(base, layer) + shares_keys * scores * 4 * plan._SCORE_PARTS
    assert SHARE * counted < held <= counted


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_a_grid(name: str) -> None:
    """DeepSeek's values are narrower than its keys: no kernel of a processor serves, and scores are held."""
    base, layer = recorded(name)
    block_out = base.block_out(layer).expand(ROWS, -1, -1)
    scores = plan._attention(base)[0] * POS * POS
    with BranchRunner(base, layer, 1, shares_keys=True) as run:
        rows = GridRows(base, [RowsOfSequence(0, ROWS)], block_out, scores)
        kernels = {piece.kernel for piece in rows.attention_mask(layer + 1).pieces}
        held = peak(lambda: run.through(rows))
    assert (plain_kernel in kernels) == (name == "deepseek_v3")
    counted = ROWS * POS * plan._grid_branch_bytes(base, layer)
    counted += (name == "deepseek_v3") * scores * 4 * plan._SCORE_PARTS
    assert SHARE * counted < held <= counted


@pytest.mark.parametrize("way", ["shared keys", "copied keys", "grid"])
@pytest.mark.parametrize("budget", [4 * 2**20, 2**24])
def test_the_whole_stays_within_its_budget(way: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, layer = recorded("gpt_oss")
    base.shares_keys = way != "copied keys"
    monkeypatch.setattr(policy, "AT_ONCE", {"cpu": policy.AtOnce(10**9, 10**9, 10**9, 10**9)})
    if way == "grid":
        monkeypatch.setitem(policy.GRID_SHARES, "cpu", GridShares(0.0, 0.0))
    routes = check_routes(base, layer, random_routes(base.moe, layer, base.tokens, n_routes=40))
    held = peak(lambda: score_from_base(base, {layer: routes}, method="branch", memory_budget=budget))
    assert 0.1 * budget < held <= budget
