"""The training loop: steps, evaluations, and checkpoints from which an interrupted run goes on exactly.

Where several processes share a run (``accelerate launch``), each scores its part of a step's tokens, the gradients are
summed, and every process takes the same step of the optimiser. The first process writes the checkpoint.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from moe_interp.errors import ResultError, TrainingError
from moe_interp.experiments.router_tuning.evaluation import PER_TOKEN, Evaluation, HeldOut
from moe_interp.experiments.router_tuning.options import TuningOptions
from moe_interp.experiments.router_tuning.routers import TunedRouter
from moe_interp.experiments.router_tuning.step import step_loss
from moe_interp.experiments.router_tuning.token_sources.tokens import TokenSource, epoch_order
from moe_interp.processes import accelerator, summed
from moe_interp.progress import Report
from moe_interp.results.files import replacing
from moe_interp.results.seals import read_sealed, sealed_zip
from moe_interp.routes import TokenKeys
from moe_interp.stats import derive_rng

RESTORE = "Restore it from a copy, or tune anew in another folder."
STEP = ("loss", "lr", "gradient_norm", "better")


@dataclass
class History:
    """What has been seen so far.

    Attributes:
        steps: By name of ``STEP``, a number a step.
        evaluations: (step, weight change by layer, evaluation) of each.
    """

    steps: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STEP})
    evaluations: list[tuple[int, list[float], Evaluation]] = field(default_factory=list)


class Tuning:
    """A run's weights and optimiser.

    Args:
        source: The tokens trained on.
        routers: What is tuned.
        held_out: Where it is evaluated.
        options: The run's.
        plan: What the run is, in words that a checkpoint must repeat.
        path: The checkpoint; None keeps none.
        processes: Those that share the run; accelerate's by default.
    """

    def __init__(
        self,
        source: TokenSource,
        routers: tuple[TunedRouter, ...],
        held_out: HeldOut,
        options: TuningOptions,
        plan: str,
        path: Path | None = None,
        processes: Accelerator | None = None,
    ) -> None:
        self.processes = accelerator() if processes is None else processes
        self.source, self.routers, self.held_out = source, routers, held_out
        self.options, self.plan, self.path = options, plan, path
        self.start = {router.layer: router.start() for router in routers}
        self.weights = {layer: weight.clone().requires_grad_() for layer, weight in self.start.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()), lr=options.lr, weight_decay=options.weight_decay
        )
        self.step, self.history = 0, History()
        self.n_steps = options.n_steps(len(source.table))
        self.is_saved = False
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def run(self, report: Report, stop_at: int | None = None) -> None:
        """All steps that are left, with an evaluation before the first and after the last."""
        end = self.n_steps if stop_at is None else min(stop_at, self.n_steps)
        every = self.options.evaluate_every or max(1, -(-self.n_steps // 4))
        save_every = self.options.checkpoint_every or every
        if not self.history.evaluations:
            self.evaluate()
        while self.step < end:
            report(self.step, self.n_steps)
            self.train_step()
            if self.step % every == 0 or self.step == self.n_steps:
                self.evaluate()
            if self.path is not None and (self.step % save_every == 0 or self.step == end):
                self.save()
        if self.history.evaluations[-1][0] != self.step:
            self.evaluate()  # of a run that was stopped before its end; no part of the checkpoint
        report(self.step, self.n_steps)

    def rows_of(self, step: int) -> Tensor:
        """``[token]``: the batch of a step, which the seed and its number alone decide."""
        epoch, within = divmod(step, self.options.steps_per_epoch(len(self.source.table)))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self.source, self.options.seed, epoch)
        start = within * self.options.batch_size
        return torch.from_numpy(self._order[1][start : start + self.options.batch_size])

    def loss(self, step: int) -> tuple[Tensor, int]:
        """The loss of a step's batch under the weights as they are, and how many tokens had a better route.

        Of several processes each gives the part of its own tokens: the batch's loss is the sum.
        """
        batch = self.rows_of(step)
        rows = batch.tensor_split(self.processes.num_processes)[self.processes.process_index]
        if not len(rows):
            return torch.zeros(()), 0
        opened = self.source.open(rows, self.weights)
        epoch = step // self.options.steps_per_epoch(len(self.source.table))
        sequence, pos = self.source.table.keys(rows)
        seed = int(derive_rng(self.options.seed, "routes of an epoch", epoch).integers(2**62))
        keys = {}
        for router in self.routers:
            device = opened.inputs[router.layer].device
            keys[router.layer] = TokenKeys(seed, router.layer, sequence.to(device), pos.to(device))
        loss, n_better = step_loss(opened, self.routers, self.weights, self.start, self.options, keys)
        return loss * (len(rows) / len(batch)), n_better

    def train_step(self) -> None:
        """One optimiser step.

        Raises:
            TrainingError: a loss, gradient or weight that is not finite; weights and checkpoint are those before the
                step.
        """
        rate = self.options.rate(self.step, self.n_steps)
        loss, n_better = self.loss(self.step)
        numbers = torch.tensor([float(loss.detach()), float(n_better)], dtype=torch.float64)
        value, better = summed(self.processes, numbers).tolist()
        self._check("loss", value, rate)
        leaves = list(self.weights.values())
        # of these alone: no other parameter of the model gets a gradient
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        for leaf, gradient in zip(leaves, found):
            leaf.grad = summed(self.processes, torch.zeros_like(leaf) if gradient is None else gradient)
        norm = float(torch.nn.utils.clip_grad_norm_(leaves, self.options.clip or math.inf))
        self._check("gradient's norm", norm, rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        kept = [leaf.detach().clone() for leaf in leaves]
        self.optimizer.step()
        with torch.no_grad():
            if not all(bool(leaf.isfinite().all()) for leaf in leaves):
                for leaf, old in zip(leaves, kept):
                    leaf.copy_(old)
                self._check("tuned weight", math.inf, rate)
        self.optimizer.zero_grad(set_to_none=True)
        for name, number in zip(STEP, (value, rate, norm, better)):
            self.history.steps[name].append(number)
        self.step += 1

    def evaluate(self) -> None:
        """Evaluate the weights as they are, and keep what was found.

        Raises:
            TrainingError: a cross-entropy that is not finite; the checkpoint is that of before.
        """
        change = [
            float((self.weights[layer].detach() - start).norm() / start.norm()) for layer, start in self.start.items()
        ]
        found = self.held_out.evaluate(self.weights)
        rate = self.options.rate(max(0, self.step - 1), self.n_steps)
        self._check("held-out cross-entropy", float(found.ce.sum()), rate)
        self.history.evaluations.append((self.step, change, found))

    def _check(self, name: str, value: float, rate: float) -> None:
        if not math.isfinite(value):
            kept = f"The checkpoint {str(self.path)!r} is kept" if self.is_saved else "No checkpoint was written yet"
            raise TrainingError(
                f"the {name} is {value} at step {self.step}, learning rate {rate:.3g}",
                f"a finite {name}",
                f"{kept}; the model is as it was. Lower the learning rate, or look for overflow in the model.",
            )

    # -- checkpoints ------------------------------------------------------------------------------------------------
    def save(self) -> None:
        """Everything that the next step depends on, and the history; a kill leaves the old one."""
        assert self.path is not None
        self.is_saved = True
        if not self.processes.is_main_process:
            return
        found = self.history.evaluations
        state = {
            "plan": self.plan,
            "step": self.step,
            "weights": {layer: weight.detach() for layer, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "steps": self.history.steps,
            "evaluations": [(step, change, _as_tensors(one)) for step, change, one in found],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with replacing(self.path) as file:
            file.write(sealed_zip(buffer.getvalue()))

    def load(self) -> None:
        """Inverse of :meth:`save`.

        Raises:
            ResultError: a checkpoint of another run, or one that was damaged.
        """
        assert self.path is not None
        content = read_sealed(self.path, "a checkpoint", RESTORE)
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            plan = str(state["plan"])
        except Exception as error:  # torch and zip raise errors of any class
            given = f"{str(self.path)!r} cannot be read as a checkpoint ({type(error).__name__}: {error})"
            raise ResultError(given, "a checkpoint of router tuning", RESTORE) from error
        if plan != self.plan:
            raise ResultError(
                f"{str(self.path)!r} is of a run of another model, other sequences or other options",
                "the very same run",
                "Repeat the options of that run, or choose another folder.",
            )
        with torch.no_grad():
            for layer, weight in self.weights.items():
                weight.copy_(state["weights"][layer])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.is_saved = int(state["step"]), True
        self.history = History(
            state["steps"], [(step, change, _from_tensors(one)) for step, change, one in state["evaluations"]]
        )


def _as_tensors(found: Evaluation) -> dict[str, Tensor]:
    values = {"ce": found.ce, "load": found.load, **found.per_token}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}


def _from_tensors(kept: dict[str, Tensor]) -> Evaluation:
    return Evaluation(kept["ce"].numpy(), {name: kept[name].numpy() for name in PER_TOKEN}, kept["load"].numpy())
