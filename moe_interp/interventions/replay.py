"""Replay recorded routes, at their own places or at others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions.positions import Positions, TokenSelection, as_mask
from moe_interp.interventions.recorded import OUTSIDE, columns, is_cache, reader, recorded_routes
from moe_interp.interventions.route_writer import RouteWriter
from moe_interp.types import Hooks, Layer


def replay_routes(
    moe: MoEHooks,
    trace: Any,
    layers: Sequence[Layer] | Literal["moe"] | None = None,
    positions: Positions = "all",
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Make tokens take the routes of a recorded run. Replaying a run's own routes changes nothing, to the last bit.

    Args:
        moe: Attached hooks.
        trace: A cache with ``expert_indices`` (and ``expert_weights``, if they are to be replayed too), whose rows and
            positions are those of the batch; or a ``RoutingTrace``, whose s-th sequence is for row s of the batch and
            which counts positions from each row's first real token. Tokens that the trace does not cover (-2) are left
            to the model's own router.
        layers: Layers to replay, as the trace labels them; by default all that were recorded. "moe": the columns of the
            trace are all the model's MoE layers, in their order and whatever their labels, as inference engines record
            them.
        positions, attention_mask: See :class:`.positions.TokenSelection`; every step by default, so that a
            step of ``generate`` outside the trace is refused. With a cache, both runs have the same padding.

    Raises:
        RouteError: nothing recorded at a layer, recorded layers that are none of the attached MoE layers or that look
            like the MoE layers counted from 0, routes of another model, or (when it runs) a token outside the trace.
        ConfigError: ``layers`` of another kind.
    """
    check_attached(moe)
    hooks: Hooks = []
    for layer, (indices, weights) in recorded_routes(moe, trace, layers).items():
        name, selection = moe.hook_name("expert_indices", layer), TokenSelection(moe, layer, positions, attention_mask)
        same = partial(_same_place, selection, is_cache(trace), len(indices))
        weigh = None if weights is None else reader(selection, weights, same, name)
        hooks += RouteWriter(moe, layer, selection, reader(selection, indices, same, name), weigh).hooks
    return hooks


def _same_place(selection: TokenSelection, by_column: bool, n_rows: int, value: Tensor) -> tuple[Tensor, Tensor]:
    row = selection.given_rows(value, n_rows).unsqueeze(1).expand(value.shape[:2])
    return row, columns(selection, value) if by_column else selection.index(value)


def routes_from(
    moe: MoEHooks,
    source: Any,
    layers: Sequence[Layer] | Literal["moe"] | None = None,
    positions: Positions = None,
    source_positions: Sequence[int] | Tensor | None = None,
    source_rows: int | Sequence[int] | None = None,
    weights: Literal["recorded", "family"] = "recorded",
    attention_mask: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> Hooks:
    """Give chosen positions the routes that other positions, or other prompts, had in another run.

    All positions count in the sequence without its padding. ``replay_routes`` is the case in which every token takes
    the route of its own place.

    Args:
        moe: Attached hooks.
        source: A cache with ``expert_indices`` (and ``expert_weights``), or a ``RoutingTrace``.
        layers: Layers, as the source labels them; by default all that were recorded; "moe" as in ``replay_routes``.
        positions, attention_mask: The tokens that take a route: see :class:`.positions.TokenSelection`.
        source_positions: For each of ``positions``, which then are integers, the position that its route is from;
            negative ones count from the end of the source's sequence. By default the same positions.
        source_rows: For each row of the batch the source's row (sequence); one for all; by default the same row, or the
            only one of the source. Under ``generate``, rows are those of the prompts, for all their beams and samples.
        weights: "recorded": those of the other run, where the source has them. "family": the family's own for the
            taken experts, from this run's logits.
        source_mask: ``[row, pos]``, 1 at the real tokens of a cache; without it, its columns are its positions.

    Raises:
        RouteError: nothing recorded at a layer, routes of another model, a mask that is not the source's; when it runs,
            a position that the source does not have or does not cover, or a left-padded batch of which the source's
            padding is not known.
        ConfigError: source positions that do not match ``positions``, or other weights.
    """
    check_attached(moe)
    if weights not in ("recorded", "family"):
        raise ConfigError(f"weights={weights!r}", '"recorded" or "family"', "Correct the weights.")
    hooks: Hooks = []
    for layer, (indices, recorded) in recorded_routes(moe, source, layers).items():
        name, selection = moe.hook_name("expert_indices", layer), TokenSelection(moe, layer, positions, attention_mask)
        place = OtherPlace(selection, indices, is_cache(source), source_positions, source_rows, source_mask)
        weigh = None if recorded is None or weights == "family" else reader(selection, recorded, place, name)
        route = reader(selection, indices, place, name, needs_all=True)
        hooks += RouteWriter(moe, layer, selection, route, weigh).hooks
    return hooks


class OtherPlace:
    """From the tokens of a running pass to the recorded sequences and positions that their routes are from."""

    def __init__(
        self, selection: TokenSelection, routes: Tensor, is_cache: bool, positions: Any, rows: Any, mask: Tensor | None
    ) -> None:
        self.selection, self.n_rows = selection, routes.shape[0]
        real = (routes != OUTSIDE).all(dim=-1) if mask is None else as_mask(mask, "a source_mask")
        if real.shape != routes.shape[:2] or (mask is not None and not is_cache):
            raise RouteError(
                f"a source_mask of shape {tuple(real.shape)} for a source of {routes.shape[0]} x {routes.shape[1]}",
                "[row, pos] of a cache; a RoutingTrace has no padding",
                "Pass the mask that the cached run had.",
            )
        self.needs_mask = is_cache and mask is None
        # the columns of real tokens, in order, and how many there are
        self.column = (~real).to(torch.int8).sort(dim=-1, stable=True).indices
        self.length = real.sum(dim=-1)
        self.positions = None if positions is None else self._checked(positions)
        self.rows = None if rows is None else self._checked_rows(rows)

    def __call__(self, value: Tensor) -> tuple[Tensor, Tensor]:
        row, at = self._row(value), self.selection.index(value)
        if self.positions is not None:
            place = self.selection.listed_at(value)
            at = self.positions.to(value.device)[place.clamp(min=0)]
        known = row.clamp(max=self.n_rows - 1)  # `reader` refuses a row that the source does not have
        length = self.length.to(value.device)[known]
        at = torch.where(at < 0, at + length, at) if self.positions is not None else at
        if self.needs_mask and bool(
            (self.selection.tokens(value) & (self.selection.index(value) != columns(self.selection, value))).any()
        ):
            raise RouteError(
                "a left-padded batch and a cache without its mask",
                "source_mask, which tells where the cached sequences begin",
                "Pass the mask that the cached run had; the model was left as it was.",
            )
        is_inside = (at >= 0) & (at < length)
        column = self.column.to(value.device)[known, at.clamp(0, self.column.shape[1] - 1)]
        return row, torch.where(is_inside, column, self.column.shape[1])

    def _row(self, value: Tensor) -> Tensor:
        batch, named = value.shape[0], self.rows is not None
        # by default each row of the source is for the row of its number
        chosen = torch.arange(self.n_rows) if self.rows is None else self.rows.reshape(-1)
        mine = self.selection.given_rows(value, len(chosen))
        mine = torch.zeros_like(mine) if len(chosen) == 1 else mine
        if named and len(chosen) > 1 and int(mine.max()) != len(chosen) - 1:
            raise ConfigError(
                f"{len(chosen)} source_rows for a pass of {batch} rows", "one, or one a row", "Correct the rows."
            )
        row = chosen.to(value.device)[mine] if named else mine
        return row.unsqueeze(1).expand(value.shape[:2])

    def _checked_rows(self, rows: Any) -> Tensor:
        chosen = _integers(rows)
        if chosen is None or chosen.ndim > 1 or bool(((chosen < 0) | (chosen >= self.n_rows)).any()):
            raise ConfigError(f"source_rows={rows!r}", f"rows from 0 to {self.n_rows - 1}", "Correct the rows.")
        return chosen

    def _checked(self, positions: Any) -> Tensor:
        chosen = _integers(positions)
        n = len(self.selection.listed) if self.selection.named == "listed" else 0
        if chosen is None or chosen.numel() != n or not n:
            raise ConfigError(
                f"source_positions={positions!r} for {n} listed positions",
                "one integer for each of `positions`, which are integers too",
                "Name both, in the same order.",
            )
        return chosen.reshape(-1)


def _integers(given: Any) -> Tensor | None:
    """A tensor of int64; None for anything but integers."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        return None
    is_whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    return found.long() if is_whole and found.numel() else None
