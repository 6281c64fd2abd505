"""Running a sweep: which cells need a pass, and the metric's value of each. Where passes start: ``passes.py``."""

from __future__ import annotations

import itertools
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_interp.engine.memory import Memory
from moe_interp.errors import DataError
from moe_interp.patching.cells import Grid
from moe_interp.patching.metric import Metrics
from moe_interp.patching.passes import Cell, CorruptedRun, Method
from moe_interp.patching.patches import Patch
from moe_interp.patching.result import EXAMPLE, METRIC, PatchingSweep, effect_dataset
from moe_interp.progress import Report, reporting


class Sweep:
    """One sweep.

    Args:
        what: What is patched, in words.
        patch: What a layer's cells are made of.
        grid: The axes.
        cache: The clean run's.
        metrics: Not evaluated yet.
        method: How the passes are made.
    """

    def __init__(self, what: str, patch: type[Patch], grid: Grid, cache: Any, metrics: Metrics, method: Method) -> None:
        self.what, self.patch, self.grid, self.cache = what, patch, grid, cache
        self.metrics, self.method = metrics, method
        self.inputs = grid.inputs

    def run(self, clean_logits: Tensor | None, memory: Memory, progress: bool | Report | None) -> PatchingSweep:
        """All cells of all layers."""
        corrupted = CorruptedRun(self.inputs, self.patch.reads, self.method, memory)
        logits = corrupted.logits
        baseline = self.metrics.first(logits.clone(), "the corrupted run")  # it may write into them
        clean = None if clean_logits is None else self._clean(clean_logits, logits)
        shape = (len(self.inputs.layers), *(len(labels) for labels in self.grid.axes.values()))
        n_examples = len(self.inputs.tokens)
        value = torch.full((*shape, *baseline.shape), float("nan"), dtype=baseline.dtype)
        counts = np.zeros((2, *shape, n_examples), dtype=np.int64)
        n_skipped, total = 0, int(np.prod(shape))
        with reporting(f"patching {self.what}", progress) as report:
            for number, layer in enumerate(self.inputs.layers):
                patch = self.patch(self.inputs, layer, self.cache, corrupted.activations)
                todo = []
                for place in itertools.product(*map(range, self.grid.size(layer))):
                    where = self.grid.where(patch, place)
                    exists = self.grid.exists(place)
                    cell, at = Cell.of(place, partial(self.grid.where, patch, place), patch.differs), (number, *place)
                    value[at] = self._existing(baseline, exists)
                    counts[0][at] = where.flatten(1).sum(dim=1).cpu().numpy()
                    if self.grid.unmatched is not None:
                        counts[1][at] = self.grid.unmatched(patch, place).sum(dim=1).cpu().numpy()
                    todo += [cell] if bool(cell.changes.any()) else []
                n_skipped += int(np.prod(self.grid.size(layer))) - len(todo)
                done = number * total // len(self.inputs.layers)
                with closing(corrupted.values(patch, todo, self.metrics)) as values:
                    for cell, found in values:
                        value[(number, *cell.place)] = self._existing(
                            self.metrics.noted(found), self.grid.exists(cell.place)
                        )
                        done += 1
                        report(done, total)
            report(total, total)
        self.metrics.warn_of_nan()
        return self._result(value, baseline, clean, counts, n_skipped, corrupted.null_difference)

    def _existing(self, values: Tensor, exists: Tensor) -> Tensor:
        """``[metric, example]``, NaN where an example has no such cell; of plain numbers, where no example has."""
        if not self.metrics.is_per_example:
            exists = exists.any(dim=0, keepdim=True)
        return values.masked_fill(~exists, float("nan")).cpu()

    def _clean(self, clean_logits: Tensor, logits: Tensor) -> Tensor:
        if not isinstance(clean_logits, Tensor) or clean_logits.shape != logits.shape:
            raise DataError(
                f"clean_logits of shape {tuple(getattr(clean_logits, 'shape', ()))}",
                f"the clean run's logits, {tuple(logits.shape)}",
                "Pass what the clean run returned.",
            )
        return self.metrics(clean_logits.to(logits.device)).cpu()

    def _result(
        self,
        value: Tensor,
        baseline: Tensor,
        clean: Tensor | None,
        counts: Any,
        n_skipped: int,
        null_difference: float | None,
    ) -> PatchingSweep:
        inputs = self.inputs
        axes = {"layer": list(inputs.layers), **self.grid.axes}
        # shape: (*cells, metric, example) -> (metric, *cells, example)
        ordered = value.movedim(-2, 0).double().numpy()
        before = baseline.cpu().double().numpy()
        more = {
            "value": ((METRIC, *axes, EXAMPLE), ordered),
            "baseline": ((METRIC, EXAMPLE), before),
            "n_patched": ((*axes, EXAMPLE), counts[0]),
            "n_unmatched": ((*axes, EXAMPLE), counts[1]),
        }
        if clean is not None:
            more["clean"] = ((METRIC, EXAMPLE), clean.double().numpy())
        effect = ordered - before.reshape(len(before), *[1] * len(axes), -1)
        data = effect_dataset(self.metrics, axes, effect, len(inputs.tokens), **more)
        data.attrs = {
            "what": self.what,
            "metrics": list(self.metrics.names),
            "n_examples": len(inputs.tokens),
            "n_skipped": n_skipped,
            "method": "naive" if null_difference is None else "rerun",
            "null_difference": null_difference,
        }
        return PatchingSweep(data, config={"what": self.what, "method": self.method, "layers": axes["layer"]})
