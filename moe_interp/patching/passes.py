"""Where the passes of a sweep start: in a recorded pass, many cells at a time, or one ``run_with_hooks`` a cell.

Passes that start in a recorded one are run by ``moe_interp/engine/sequence_ends``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_interp.engine.memory import Memory, tokens_per_pass
from moe_interp.engine.policy import policy_of
from moe_interp.engine.recorded_pass import RecordedPass, record_pass
from moe_interp.engine.sequence_ends.runner import (
    ROUNDING,
    EndRunner,
    block_out_with,
    end_refusal,
    fuses_attention,
    null_difference,
)
from moe_interp.errors import ConfigError, warn
from moe_interp.patching.inputs import PatchInputs
from moe_interp.patching.metric import Metrics
from moe_interp.patching.nan_reads import NaNReads
from moe_interp.patching.patches import Activations, Patch, TokenPatch
from moe_interp.types import Layer

Method = Literal["auto", "rerun", "naive"]
METHODS: tuple[Method, ...] = ("auto", "rerun", "naive")


class RerunNotExactWarning(UserWarning):
    """A model whose layers cannot be started in the middle; each cell is a whole pass instead, which is slow."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell of a layer.

    Attributes:
        place: On the inner axes.
        where: Gives the mask of its activations, anew each time: a sweep may have many cells.
        changes: ``[batch]``, the examples in which one of them differs between the runs.
        start: The first column of a change.
    """

    place: tuple[int, ...]
    where: Callable[[], Tensor]
    changes: Tensor
    start: int

    @classmethod
    def of(cls, place: tuple[int, ...], where: Callable[[], Tensor], differs: Tensor) -> Cell:
        """A cell, from the mask of activations that differ between the runs."""
        changed = where() & differs
        columns = changed.any(dim=-1) if changed.ndim > 2 else changed
        return cls(place, where, columns.any(dim=1), int(columns.any(dim=0).long().argmax()))


class CorruptedRun:
    """One plain pass of the corrupted batch, and patched passes that begin in it.

    Args:
        inputs: The corrupted batch.
        names: Bare names of the hooks whose activations are kept.
        method: "auto", "rerun" or "naive".
        memory: Of the run.

    Attributes:
        logits: ``[batch, pos, vocab]`` of the plain pass.
        activations: By bare hook name and layer.
        null_difference: The largest change of a log-probability by a pass with nothing patched, in nats; None where all
            passes are whole ones.

    Raises:
        ConfigError: "rerun", on a model where it is not exact.
    """

    def __init__(self, inputs: PatchInputs, names: Sequence[str], method: Method, memory: Memory) -> None:
        self.inputs, self.method, self.memory = inputs, method, memory
        self.null_difference: float | None = None
        self._found: dict[tuple[str, Layer], Tensor] = {}
        self._known_reads: dict[Metrics, Tensor | None] = {}
        self._base: RecordedPass | None = None
        reason = "it was asked for" if method == "naive" else self._refusal()
        hooks = [
            (inputs.moe.hook_name(name, layer), self._keeper(name, layer)) for layer in inputs.layers for name in names
        ]
        if reason is None:
            with inputs.moe.bridge.hooks(fwd_hooks=hooks):
                layers = [layer for layer in inputs.layers if isinstance(layer, int)]
                self._base = record_pass(inputs.moe, inputs.tokens, layers, inputs.mask)
            self.logits = self._base.logits
        else:
            if method == "rerun":
                self._refuse(reason)
            self.logits = inputs.forward(hooks=hooks)
        self.activations: Activations = self._found
        self._fuses = self._base is not None and fuses_attention(self._base)
        self._buffer: Tensor | None = None

    def values(self, patch: Patch, cells: list[Cell], metrics: Metrics) -> Generator[tuple[Cell, Tensor]]:
        """Each cell with its metrics ``[metric, example]``, in any order; to be closed where it is left early."""
        layer = patch.layer
        if not cells:
            return
        is_fused = self._is_fused_from(layer)
        if is_fused is None:
            for cell in cells:
                yield cell, metrics(self.inputs.forward(hooks=patch.hooks(cell.where())))
            return
        base = self._base
        assert base is not None
        assert isinstance(layer, int)
        plain = base.block_out(layer).view(*base.tokens.shape, -1)
        if isinstance(patch, TokenPatch):
            patch.patched_out = block_out_with(base, layer, patch.hooks(base.is_real))
        ordered = sorted(cells, key=lambda cell: cell.start)
        at_once = self._tokens_at_once()
        reads = self._reads(metrics)
        with EndRunner(base, layer, at_once, is_fused, reads) as run:
            for some in _chunks(ordered, base.tokens.shape[1], at_once):
                start = some[0].start
                rows = [cell.changes.nonzero().flatten() for cell in some]
                out = torch.cat([patch.block_out(c.where(), plain, r, start) for c, r in zip(some, rows)])
                logits = self._logits(run, torch.cat(rows), start, out)
                for cell, row, part in zip(some, rows, logits.split([len(row) for row in rows])):
                    yield cell, self._metric(metrics, row, start, part)
        self.memory.say()

    def _logits(self, run: EndRunner, sequence: Tensor, start: int, out: Tensor) -> Tensor:
        n = max(1, self._tokens_at_once() // out.shape[1])
        found: list[Tensor] = []
        for rows, part in zip(sequence.split(n), out.split(n)):

            def some(which: slice, rows: Tensor = rows, part: Tensor = part) -> Tensor:
                return run.ends(rows[which], start, part[which])

            found += self.memory.in_parts(some, len(rows), "sequences")
        return torch.cat(found)

    def _metric(self, metrics: Metrics, rows: Tensor, start: int, logits: Tensor) -> Tensor:
        """The metrics of the batch with other logits in some of its examples, from a column on."""
        if self._buffer is None:
            self._buffer = self.logits.clone()
        buffer, reads = self._buffer, self._reads(metrics)
        where: Any = (rows, slice(start, None)) if reads is None else (rows, reads[rows])
        buffer[where] = (logits if reads is None else logits[:, 0]).to(buffer.dtype)
        written = buffer._version
        try:
            return metrics(buffer).clone()
        finally:
            if buffer._version == written:
                buffer[where] = self.logits[where]
            else:  # a metric that writes into its logits
                self._buffer = None

    def _reads(self, metrics: Metrics) -> Tensor | None:
        """``[batch]``: each example's last real column, where the metrics read nothing but that; else None.

        That is so where their values on the corrupted run stay the same, bit for bit, with NaN in place of all other
        logits, without an operation that would hide the NaN, and with the logits of other examples and positions.
        """
        if metrics not in self._known_reads:
            order = torch.arange(self.inputs.tokens.shape[1], device=self.logits.device)
            last = torch.where(self.inputs.is_real, order, -1).amax(dim=1)
            self._known_reads[metrics] = last if self._reads_only(metrics, last) else None
        return self._known_reads[metrics]

    def _reads_only(self, metrics: Metrics, column: Tensor) -> bool:
        row = torch.arange(len(column), device=column.device)
        expected, kept = metrics(self.logits.clone()), self.logits[row, column]
        for other in (torch.full_like(self.logits, float("nan")), self.logits.roll((1, 1), dims=(0, 1)).neg_()):
            other[row, column] = kept
            try:
                with NaNReads() as reads:
                    found = metrics(other)
            except Exception:  # a metric that checks its logits
                return False
            if reads.is_hidden or not torch.equal(found, expected):
                return False
        return True

    def _tokens_at_once(self) -> int:
        return tokens_per_pass(
            self.inputs.moe, self.inputs.tokens.shape[1], self.memory.budget, predictions_per_token=1.0
        )

    def _is_fused_from(self, layer: Layer) -> bool | None:
        """Whether attention is fused in passes from a layer; None where passes are whole ones."""
        base = self._base
        if base is None or not isinstance(layer, int):
            return None
        if reason := end_refusal(base, layer):
            if self.method == "rerun":
                self._refuse(reason)
            return None
        tolerance = policy_of(self.inputs.moe).fused_tolerance
        if self._fuses and tolerance is not None:
            found = null_difference(base, layer, is_fused=True)
            if found <= tolerance:
                self._record_null(found)
                return True
            self._fuses = False
        found = null_difference(base, layer, is_fused=False)
        if found <= ROUNDING.get(base.logits.dtype, 0.1):
            self._record_null(found)
            return False
        if self.method == "rerun":
            self._refuse(f"a pass from layer {layer} with nothing patched differs by {found:.1e} nats")
        name = type(self.inputs.moe.bridge.original_model).__name__
        warn(
            f"Starting {name} at layer {layer} changes its predictions by {found:.1e} nats: each cell is a whole pass.",
            RerunNotExactWarning,
        )
        self._base = None
        return None

    def _record_null(self, difference: float) -> None:
        self.null_difference = max(self.null_difference or 0.0, difference)

    def _refusal(self) -> str | None:
        inputs = self.inputs
        if not all(isinstance(layer, int) for layer in inputs.layers):
            return "the model is an encoder-decoder"
        if inputs.options:
            return f"the forward pass is given {', '.join(inputs.options)}"
        if any(point.has_hooks() for point in inputs.moe.bridge.hook_dict.values()):
            return "other hooks are on the model"
        return None

    def _refuse(self, reason: str) -> None:
        raise ConfigError(f"method='rerun', but {reason}", "a model that passes may begin in", "Take method='auto'.")

    def _keeper(self, name: str, layer: Layer) -> Any:
        return lambda value, hook: self._found.__setitem__((name, layer), value.detach().clone())


def _chunks(cells: list[Cell], n_pos: int, tokens: int) -> Iterator[list[Cell]]:
    """Cells in order of their first column, as many together as fit into a pass; at least one."""
    some: list[Cell] = []
    n_rows = 0
    for cell in cells:
        rows = int(cell.changes.sum())
        if some and (n_rows + rows) * (n_pos - some[0].start) > tokens:
            yield some
            some, n_rows = [], 0
        some.append(cell)
        n_rows += rows
    if some:
        yield some
