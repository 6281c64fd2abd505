"""The training loop: one model, one strategy; checkpoints, exact resume, a metrics log and a live progress bar."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moe_interp.errors import ConfigError, ResultError, TrainingError
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains import Domain
from moe_interp.testbed.evaluate import Evaluation, evaluate, max_violation, token_losses, unigram_loss
from moe_interp.testbed.metrics import routing_metrics
from moe_interp.testbed.model import bridge_model, build_model, model_tensors, save_checkpoint, train_tokenizer
from moe_interp.testbed.optim import make_optimizers
from moe_interp.testbed.packing import PackedSequences, training_sequences, validation_sequences
from moe_interp.testbed.registry import load_domains
from moe_interp.testbed.strategies import check_strategy, make_strategy
from moe_interp.testbed.strategy import Batch, Loads, Records, Setting, Strategy, recorded
from moe_interp.traces.trace import RoutingTrace


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        moe: Hooks on the trained model's bridge. They route as the family does: add ``strategy.fwd_hooks(batch)`` to
            route as in training, for a strategy that changes the route.
        domains, validation: The data, and the held-out sequences behind ``trace`` and the history's losses.
        trace: Routes of the validation sequences under the strategy, with domain labels.
        history: The log's records; the last holds the final losses.
        path: The checkpoint folder; None where nothing was saved.
    """

    config: TestbedConfig
    moe: MoEHooks
    strategy: Strategy
    tokenizer: PreTrainedTokenizerFast
    domains: tuple[Domain, ...]
    validation: PackedSequences
    trace: RoutingTrace
    history: list[dict[str, Any]]
    path: Path | None

    def specialization(self) -> pd.DataFrame:
        """:func:`moe_interp.testbed.metrics.routing_metrics` of the validation routes: one row a layer."""
        return routing_metrics(self.trace)


class Trainer:
    """One run. :func:`train` is the way in; the class keeps what a step and a checkpoint share."""

    def __init__(self, config: TestbedConfig, domains: Sequence[Domain], accelerator: Accelerator) -> None:
        _check_run(config, accelerator)
        self.config, self.domains, self.accelerator = config, tuple(domains), accelerator
        self.tokenizer = train_tokenizer(domains, config.vocab_size)
        self.data = training_sequences(
            domains,
            self.tokenizer,
            n_sequences=config.steps * config.micro_batches * config.micro_batch,
            length=config.length,
            shares=config.shares,
            mixed=config.mixed_sequences,
            domains_per_group=config.domains_per_micro_batch,
            group=config.micro_batch,
            seed=config.seed,
        )
        self.validation = validation_sequences(
            domains, self.tokenizer, n_per_domain=config.validation_sequences, length=config.length
        )
        model = build_model(config.model, len(self.tokenizer), config.seed)
        optimizers = make_optimizers(model, config.optimizer, config.lr, config.muon_lr, config.weight_decay)
        self.base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.bridge = bridge_model(model, self.tokenizer)
        self.moe = attach(self.bridge, expert_outputs=False)
        prepared = accelerator.prepare(self.bridge.original_model, *optimizers)
        self.model, self.optimizers = prepared[0], prepared[1:]
        setting = Setting(
            self.moe, config, tuple(d.name for d in domains), partial(accelerator.reduce, reduction="mean")
        )
        self.strategy = make_strategy(config.strategy, setting)
        self.bridge.train()
        self.step, self.history = 0, list[dict[str, Any]]()

    def forward(
        self, tokens: Tensor, domain: Tensor, training: bool = True, logits_to_keep: int = 0
    ) -> tuple[Tensor, Records]:
        """Logits (of the last ``logits_to_keep`` positions; 0: of all) and what each router did, under the strategy."""
        hooks = self.strategy.fwd_hooks(Batch(tokens, domain, self.step, training))
        options: dict[str, Any] = {"use_cache": False, "logits_to_keep": logits_to_keep}
        return recorded(self.moe, lambda: self.model(tokens, **options).logits, hooks)

    def micro_batch(self, micro: int) -> tuple[Tensor, Tensor]:
        """Tokens and domain labels of a micro-batch of this step; nothing but its number decides which."""
        start = (self.step * self.config.micro_batches + micro) * self.config.micro_batch
        rows = slice(start, start + self.config.micro_batch)
        tokens, domain = (
            torch.as_tensor(a[rows], dtype=torch.long, device=self.accelerator.device)
            for a in (self.data.tokens, self.data.domain)
        )
        return tokens, domain

    def train_step(self) -> dict[str, Any]:
        """One optimiser step: mean loss, auxiliary loss and dropped slots, the learning rate and each layer's load."""
        config, accelerator = self.config, self.accelerator
        factor = config.lr_factor(self.step)
        for optimizer, rates in zip(self.optimizers, self.base_lrs):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        # micro-batches are dealt out to the processes, so that the step is the same on any number of them
        mine = range(accelerator.process_index, config.micro_batches, accelerator.num_processes)
        # one micro-batch is the whole step
        measure = self.strategy.needs_step_load and config.micro_batches > 1
        step_load = self._load_of_step(mine) if measure else None
        totals = torch.zeros(3, device=accelerator.device)
        loads: dict[Any, Tensor] = {}
        for micro in mine:
            tokens, domain = self.micro_batch(micro)
            # gradients are averaged over processes once a step
            with nullcontext() if micro == mine[-1] else accelerator.no_sync(self.model):
                logits, records = self.forward(tokens, domain)
                loss = token_losses(logits, tokens).mean()
                auxiliary = self.strategy.auxiliary_loss(records, Batch(tokens, domain, self.step, True), step_load)
                accelerator.backward((loss + auxiliary) / len(mine))
            dropped = dropped_slots(records, config.model.top_k).to(loss)
            totals += torch.stack([loss.detach(), auxiliary.detach(), dropped]) / len(mine)
            _add_loads(loads, records, len(mine))
        totals = accelerator.reduce(totals, "mean")
        self._check_finite(float(totals[0]), factor)
        accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loads = {layer: accelerator.reduce(load, "mean") for layer, load in loads.items()}
        self.strategy.after_step(loads)
        self.step += 1
        means = dict(zip(("loss", "auxiliary", "dropped_slots"), totals.tolist()))
        return {**means, "lr": config.lr * factor, "loads": loads}

    @torch.no_grad()
    def _load_of_step(self, mine: range) -> Loads:
        loads: dict[Any, Tensor] = {}
        for micro in mine:
            _add_loads(loads, self.forward(*self.micro_batch(micro), logits_to_keep=1)[1], len(mine))
        return {layer: self.accelerator.reduce(load, "mean") for layer, load in loads.items()}

    def _check_finite(self, loss: float, factor: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step}, learning rate {self.config.lr * factor:.3g}",
                "a finite loss",
                "The last checkpoint is kept; start anew with a lower learning rate or a longer warm-up.",
            )

    def evaluate(self) -> Evaluation:
        """Validation losses and routes, under the strategy as it is outside training."""
        self.bridge.eval()
        found = evaluate(partial(self.forward, training=False), self.validation, self.accelerator.device)
        self.bridge.train()
        return found

    def save_state(self, path: Path) -> None:
        """Everything that the next step depends on; written beside and then moved, so a kill leaves the old one."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "fingerprint": self.config.fingerprint(),
            "step": self.step,
            "model": model_tensors(self.bridge.original_model),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "strategy": self.strategy.state_dict(),
            "history": self.history,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load_state(self, path: Path) -> None:
        """Inverse of :meth:`save_state`.

        Raises:
            ResultError: The checkpoint belongs to another configuration.
        """
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        if state["fingerprint"] != self.config.fingerprint():
            raise ResultError(
                f"{path} is of configuration {state['fingerprint']}, this run of {self.config.fingerprint()}",
                "a checkpoint of the very same configuration",
                "Resume with the configuration saved beside it, or choose another folder.",
            )
        with torch.no_grad():
            for name, tensor in model_tensors(self.bridge.original_model).items():
                tensor.copy_(state["model"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.strategy.load_state_dict(state["strategy"])
        self.step, self.history = state["step"], state["history"]


def train(
    config: TestbedConfig,
    *,
    domains: Sequence[Domain] | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    stop_at: int | None = None,
    mixed_precision: str = "no",
) -> TrainedRun:
    """Train a model on the configuration's domains (or those given) and save it as a standard checkpoint.

    Args:
        out: Folder for ``config.json``, ``metrics.jsonl``, ``state.pt`` and, at the end, ``model/``; None keeps all in
            memory.
        resume: Go on from ``state.pt`` if it is there. A run killed and resumed equals an uninterrupted one.
        stop_at: Stop (with a checkpoint) after so many steps of the schedule.
        mixed_precision: As in accelerate ("no", "bf16", "fp16").

    Raises:
        ResultError: ``out`` holds a run of another configuration, or a run and ``resume`` is False.
        TrainingError: The loss is not finite; the last checkpoint stays.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    trainer = Trainer(config, load_domains(config) if domains is None else domains, accelerator)
    folder = None if out is None else Path(out)
    if folder is not None:
        _open_folder(trainer, folder, resume)
    _run_steps(trainer, folder, min(config.steps, stop_at or config.steps), progress and accelerator.is_main_process)
    final = trainer.evaluate()
    path = None
    if folder is not None and trainer.step == config.steps:
        path = folder / "model"
        if accelerator.is_main_process:
            save_checkpoint(trainer.bridge.original_model, trainer.tokenizer, path, torch.float32)
        accelerator.wait_for_everyone()
    trainer.bridge.eval()
    trainer.moe.detach()
    moe = attach(trainer.bridge)
    trainer.strategy.rebind(moe)
    return TrainedRun(
        config=config,
        moe=moe,
        strategy=trainer.strategy,
        tokenizer=trainer.tokenizer,
        domains=trainer.domains,
        validation=trainer.validation,
        trace=final.trace,
        history=trainer.history,
        path=path,
    )


def _run_steps(trainer: Trainer, folder: Path | None, end: int, progress: bool) -> None:
    config = trainer.config
    unigram = unigram_loss(trainer.data, trainer.validation, len(trainer.tokenizer))
    tokens_per_step = config.micro_batches * config.micro_batch * config.length
    started, first = time.perf_counter(), trainer.step
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}"), disable=not progress) as bar:
        task = bar.add_task(config.strategy, total=config.steps, completed=trainer.step, status="")
        while trainer.step < end:
            made = trainer.train_step()
            step = trainer.step
            validate = step % config.validate_every == 0 or step == end
            if validate or step % config.log_every == 0:
                record: dict[str, Any] = {"step": step, "tokens": step * tokens_per_step}
                record["tokens_per_s"] = round((step - first) * tokens_per_step / (time.perf_counter() - started))
                record |= {key: made[key] for key in ("loss", "auxiliary", "dropped_slots", "lr")}
                record["max_violation"] = [max_violation(load) for load in made["loads"].values()]
                if validate:
                    record |= _validation_record(trainer.evaluate()) | {"unigram": unigram}
                trainer.history.append(record)
                _write_record(folder, record, trainer.accelerator)
                status = f"loss {record['loss']:.3f}  MaxVio {max(record['max_violation']):.2f}"
                bar.update(task, status=status)
            bar.update(task, completed=step)
            if folder is not None and (step % config.checkpoint_every == 0 or step == end):
                trainer.save_state(folder / "state.pt")


def _validation_record(found: Evaluation) -> dict[str, Any]:
    routing: dict[str, Any] = {}
    if len(found.losses) > 1:  # with one domain there is nothing to specialise in
        routing = {str(k): v for k, v in routing_metrics(found.trace).to_dict("list").items()}
    return {"validation": found.losses, "routing": routing}


def dropped_slots(records: Records, top_k: int) -> Tensor:
    """Share of the k slots a token that no expert filled, over all layers; 0 unless a strategy drops."""
    shares = [1 - (r.indices >= 0).sum() / (r.indices.shape[0] * r.indices.shape[1] * top_k) for r in records.values()]
    return torch.stack(shares).mean()


def _add_loads(loads: dict[Any, Tensor], records: Records, n: int) -> None:
    for layer, record in records.items():
        loads[layer] = loads.get(layer, torch.zeros(())) + record.load() / n


def _check_run(config: TestbedConfig, accelerator: Accelerator) -> None:
    if config.micro_batches % accelerator.num_processes:
        raise ConfigError(
            f"micro_batches={config.micro_batches} on {accelerator.num_processes} processes",
            "a multiple of the number of processes",
            "Change micro_batches or the number of processes.",
        )
    check_strategy(config.strategy)


def _open_folder(trainer: Trainer, folder: Path, resume: bool) -> None:
    state = folder / "state.pt"
    if state.exists() and not resume:
        raise ResultError(f"{folder} already holds a run", "an empty folder, or resume", "Resume, or change out.")
    folder.mkdir(parents=True, exist_ok=True)
    if state.exists():
        trainer.load_state(state)
    if trainer.accelerator.is_main_process:
        (folder / "config.json").write_text(trainer.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        # records after the checkpoint are written again
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in trainer.history), encoding="utf-8")


def _write_record(folder: Path | None, record: dict[str, Any], accelerator: Accelerator) -> None:
    if folder is not None and accelerator.is_main_process:
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
