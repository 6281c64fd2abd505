"""The training loop: one model, one strategy; checkpoints, exact resume, a metrics log and a live progress bar."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moe_interp.errors import ConfigError, ResultError, TrainingError
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains import Domain
from moe_interp.testbed.model import build_model, save_checkpoint, train_tokenizer
from moe_interp.testbed.optim import make_optimizers
from moe_interp.testbed.packing import PackedSequences, training_sequences, validation_sequences
from moe_interp.testbed.registry import load_domains
from moe_interp.testbed.strategies import MicroBatchBalance, RouterRecord, Strategy

STRATEGIES: dict[str, type[Strategy]] = {s.name: s for s in (Strategy, MicroBatchBalance)}


@dataclass(frozen=True)
class TrainedRun:
    """A finished run. ``history`` holds the log's records; ``path`` the checkpoint folder (None: nothing saved)."""

    config: TestbedConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    domains: tuple[Domain, ...]
    history: list[dict[str, Any]]
    path: Path | None


class RouterTap:
    """Reads each MoE layer's router in training: logits with their gradient, and the experts chosen."""

    def __init__(self, model: nn.Module) -> None:
        self.records: dict[int, RouterRecord] = {}
        routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._read(layer))

    def _read(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            self.records[layer] = RouterRecord(output[0], output[2])

        return hook


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood in nats of tokens 1..T-1. ``[batch, pos, vocab], [batch, pos] -> [batch, pos - 1]``."""
    return nn.functional.cross_entropy(logits[:, :-1].float().mT, tokens[:, 1:], reduction="none")


def max_violation(load: Tensor) -> float:
    """MaxVio = (max load - mean load) / mean load of one layer; 0 when balanced."""
    return float(load.max() / load.mean() - 1)


def unigram_loss(train: PackedSequences, validation: PackedSequences, vocab_size: int) -> dict[str, float]:
    """Nats per token of validation under each domain's own training unigram (add-one): the yardstick."""
    losses = {}
    for d, name in enumerate(train.names):
        counts = np.bincount(train.tokens[train.domain == d], minlength=vocab_size) + 1.0
        losses[name] = float(
            -np.log(counts / counts.sum())[validation.tokens[:, 1:][validation.domain[:, 1:] == d]].mean()
        )
    return losses


@torch.no_grad()
def validation_loss(model: nn.Module, data: PackedSequences, batch: int = 24) -> dict[str, float]:
    """Nats per token of each domain, over positions 1..T-1 of its sequences."""
    device = next(model.parameters()).device
    losses = []
    for i in range(0, len(data), batch):
        tokens = torch.as_tensor(data.tokens[i : i + batch], dtype=torch.long, device=device)
        losses.append(token_losses(model(tokens, use_cache=False).logits, tokens).cpu().numpy())
    all_losses = np.concatenate(losses)
    return {name: float(all_losses[data.domain[:, 1:] == d].mean()) for d, name in enumerate(data.names)}


class Trainer:
    """One run. :func:`train` is the way in; the class keeps what a step and a checkpoint share."""

    def __init__(self, config: TestbedConfig, domains: Sequence[Domain], accelerator: Accelerator) -> None:
        if config.micro_batches % accelerator.num_processes:
            raise ConfigError(
                f"micro_batches={config.micro_batches} on {accelerator.num_processes} processes",
                "a multiple of the number of processes",
                "Change micro_batches or the number of processes.",
            )
        if config.strategy not in STRATEGIES:
            raise ConfigError(f"strategy {config.strategy!r}", f"one of {sorted(STRATEGIES)}", "Choose another.")
        self.config, self.domains, self.accelerator = config, tuple(domains), accelerator
        self.tokenizer = train_tokenizer(domains, config.vocab_size)
        n_sequences = config.steps * config.micro_batches * config.micro_batch
        self.data = training_sequences(
            domains,
            self.tokenizer,
            n_sequences=n_sequences,
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
        self.tap = RouterTap(model)
        optimizers = make_optimizers(model, config.optimizer, config.lr, config.muon_lr, config.weight_decay)
        self.base_lrs = [[group["lr"] for group in o.param_groups] for o in optimizers]
        prepared = accelerator.prepare(model, *optimizers)
        self.model, self.optimizers = prepared[0], prepared[1:]
        self.strategy = STRATEGIES[config.strategy]()
        self.step, self.history = 0, list[dict[str, Any]]()

    def micro_batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Tokens and domain labels of one micro-batch; which one it is depends on nothing but its number."""
        start = (step * self.config.micro_batches + micro) * self.config.micro_batch
        rows = slice(start, start + self.config.micro_batch)
        device = self.accelerator.device
        return (
            torch.as_tensor(self.data.tokens[rows], dtype=torch.long, device=device),
            torch.as_tensor(self.data.domain[rows], dtype=torch.long, device=device),
        )

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; its mean loss, auxiliary loss and each layer's load."""
        config, accelerator = self.config, self.accelerator
        factor = config.lr_factor(self.step)
        for optimizer, rates in zip(self.optimizers, self.base_lrs):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        mine = range(accelerator.process_index, config.micro_batches, accelerator.num_processes)
        totals = torch.zeros(2, device=accelerator.device)
        loads: dict[int, Tensor] = {}
        for i, micro in enumerate(mine):
            tokens, _ = self.micro_batch(self.step, micro)
            last = i == len(mine) - 1
            with _no_sync(accelerator, self.model, not last):
                logits = self.model(tokens, use_cache=False).logits
                loss = token_losses(logits, tokens).mean()
                auxiliary = self.strategy.auxiliary_loss(self.tap.records)
                accelerator.backward((loss + config.balance * auxiliary) / len(mine))
            both = torch.stack([loss.detach(), torch.as_tensor(auxiliary, device=loss.device).detach()])
            totals += both / len(mine)
            for layer, record in self.tap.records.items():
                loads[layer] = loads.get(layer, 0.0) + record.load() / len(mine)
        totals = accelerator.reduce(totals, "mean")
        loads = {layer: accelerator.reduce(load, "mean") for layer, load in loads.items()}
        self._check_finite(float(totals[0]), factor)
        accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.strategy.after_step(loads)
        self.step += 1
        return {"loss": float(totals[0]), "auxiliary": float(totals[1]), "lr": config.lr * factor, "loads": loads}

    def _check_finite(self, loss: float, factor: float) -> None:
        if math.isfinite(loss):
            return
        raise TrainingError(
            f"the loss is {loss} at step {self.step}, learning rate {self.config.lr * factor:.3g}",
            "a finite loss",
            "The last checkpoint is kept: lower the learning rate, or resume from it with another seed of data.",
        )

    def validate(self) -> dict[str, float]:
        """Validation loss of each domain (nats per token)."""
        self.model.eval()
        losses = validation_loss(self.accelerator.unwrap_model(self.model), self.validation)
        self.model.train()
        return losses

    def save_state(self, path: Path) -> None:
        """Everything that the next step depends on; written beside and then moved, so a kill leaves the old one."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "fingerprint": self.config.fingerprint(),
            "step": self.step,
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
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
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.strategy.load_state_dict(state["strategy"])
        self.step, self.history = state["step"], state["history"]


@contextmanager
def _no_sync(accelerator: Accelerator, model: nn.Module, skip: bool) -> Iterator[None]:
    """Gradients are averaged over processes only once a step."""
    if skip:
        with accelerator.no_sync(model):
            yield
    else:
        yield


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
    unigram = unigram_loss(trainer.data, trainer.validation, len(trainer.tokenizer))
    tokens_per_step = config.micro_batches * config.micro_batch * config.length
    started, first = time.perf_counter(), trainer.step
    end = min(config.steps, stop_at or config.steps)
    with _progress_bar(progress and accelerator.is_main_process) as bar:
        task = bar.add_task("training", total=config.steps, completed=trainer.step, status="")
        while trainer.step < end:
            out_of_step = trainer.train_step()
            step = trainer.step
            if step % config.log_every == 0 or step == end or step % config.validate_every == 0:
                violations = [max_violation(load) for load in out_of_step["loads"].values()]
                speed = (step - first) * tokens_per_step / (time.perf_counter() - started)
                record: dict[str, Any] = {"step": step, "tokens": step * tokens_per_step, "tokens_per_s": round(speed)}
                record |= {k: out_of_step[k] for k in ("loss", "auxiliary", "lr")} | {"max_violation": violations}
                if step % config.validate_every == 0 or step == end:
                    record |= {"validation": trainer.validate(), "unigram": unigram}
                trainer.history.append(record)
                _write_record(folder, record, accelerator)
                bar.update(task, status=f"loss {record['loss']:.3f}  MaxVio {max(violations):.2f}")
            bar.update(task, completed=step)
            if folder is not None and (step % config.checkpoint_every == 0 or step == end):
                trainer.save_state(folder / "state.pt")
    model = accelerator.unwrap_model(trainer.model).eval()
    if folder is not None and trainer.step == config.steps and accelerator.is_main_process:
        save_checkpoint(model, trainer.tokenizer, folder / "model", torch.float32)
    path = None if folder is None else folder / "model"
    return TrainedRun(config, model, trainer.tokenizer, trainer.domains, trainer.history, path)


def _open_folder(trainer: Trainer, folder: Path, resume: bool) -> None:
    state = folder / "state.pt"
    if state.exists() and not resume:
        raise ResultError(
            f"{folder} already holds a run", "an empty folder, or resume", "Pass resume=True or another out."
        )
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


def _progress_bar(visible: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[status]}"), disable=not visible)
