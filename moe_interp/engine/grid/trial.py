"""Whether a model's branches may run as a grid: tried on standard routes."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_interp.engine.branches import BranchRunner
from moe_interp.engine.grid.rows import GridRows, RowsOfSequence
from moe_interp.engine.memory import Memory, is_out_of_memory
from moe_interp.engine.policy import policy_of
from moe_interp.engine.recorded_pass import RecordedPass

_TRIED_SEQUENCES, _TRIED_TOKENS = 4, 16


def can_run_grid(base: RecordedPass) -> bool:
    """Whether branches may run as a grid: tried once on standard routes, beside the plain forward.

    Not where attention is no function in transformers' table, is more than a softmax over keys, or has other keys than
    the recorded pass has put in the cache.
    """
    if base.runs_grid is None:
        base.runs_grid = _runs_grid(base)
    return base.runs_grid


def _runs_grid(base: RecordedPass) -> bool:
    layer = min((layer for layer in base.layers if base.refusal(layer) is None), default=None)
    tolerance = policy_of(base.moe).grid_tolerance(base.logits.dtype)
    if layer is None or tolerance is None:
        return False
    batch, pos = base.tokens.shape
    chosen = torch.linspace(0, batch - 1, min(batch, _TRIED_SEQUENCES)).long().tolist()
    block_out = base.block_out(layer).view(batch, pos, -1)
    distances: list[Tensor] = []
    try:
        with torch.no_grad(), BranchRunner(base, layer, shares_keys=True) as run:

            def distance(part: slice) -> None:
                some = chosen[part]
                rows = GridRows(base, [RowsOfSequence(s, 1) for s in some], block_out[some])
                places = [base.is_real[s].nonzero().flatten() for s in some]
                states = run.through(rows)
                for row, (s, real) in enumerate(zip(some, places)):
                    at = real[torch.linspace(0, len(real) - 1, _TRIED_TOKENS // len(chosen), device=real.device).long()]
                    distances.append((run.logits(states[row, at]) - base.logits[s, at]).abs().amax(dim=-1))

            Memory(base.moe).in_parts(distance, len(chosen), "tried")
    except Exception as error:  # a model that reads the mask or the keys in a way of its own, whatever it then says
        if is_out_of_memory(error):
            raise
        return False
    distance_of = torch.cat(distances)
    # at half precision near-ties of later routers are common
    worst = distance_of.max() if tolerance.of_all else distance_of.median()
    return bool(worst <= tolerance.share * base.logits.abs().max())
