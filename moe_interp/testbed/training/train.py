"""The training loop: one model, one strategy; checkpoints, exact resume, a metrics log and a live progress bar."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from moe_interp.engine import threads_asleep
from moe_interp.errors import ConfigError, first_sentence
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.processes import accelerator
from moe_interp.results import checksum
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.domains.packing import PackedSequences
from moe_interp.testbed.domains.registry import load_domains
from moe_interp.testbed.evaluate import Evaluation, max_violation, unigram_loss
from moe_interp.testbed.metrics import routing_metrics, use_metrics
from moe_interp.testbed.model import save_checkpoint
from moe_interp.testbed.strategies.strategy import Strategy
from moe_interp.testbed.strategies.table import check_strategy
from moe_interp.testbed.training.compilation import Compile, check_compile
from moe_interp.testbed.training.run_folder import RunFolder
from moe_interp.testbed.training.trainer import Trainer
from moe_interp.traces.trace import RoutingTrace

PRECISIONS = ("no", "bf16")
VERSIONS = {"no": 1, "bf16": 2}  # of the method, by precision; raised when the same configuration gives another run


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

    def shared_direction(self) -> pd.DataFrame:
        """:func:`moe_interp.testbed.shared_direction.shared_direction_gains` at the end of training: one row a layer.

        Raises:
            ConfigError: The run did not measure it.
        """
        if "shared_direction" not in self.history[-1]:
            given = "a run with shared_direction=False, or of an earlier version"
            raise ConfigError(given, "a run that measured it", "Train one with shared_direction=True.")
        return pd.DataFrame(self.history[-1]["shared_direction"])


@threads_asleep()
def train(
    config: TestbedConfig,
    *,
    domains: Sequence[Domain] | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    stop_at: int | None = None,
    mixed_precision: str = "no",
    device: str | torch.device | None = None,
    compile: Compile = None,
) -> TrainedRun:
    """Train a model on the configuration's domains (or those given) and save it as a standard checkpoint.

    Args:
        out: Folder for ``config.json``, ``metrics.jsonl``, ``state.pt`` and, at the end, ``model/``; None keeps all in
            memory.
        resume: Go on from ``state.pt`` if it is there. A run killed and resumed equals an uninterrupted one.
        stop_at: Stop (with a checkpoint) after so many steps of the schedule.
        mixed_precision: "no", or "bf16" (autocast, for a GPU; weights and optimiser stay float32).
        device: Where to train, such as "cuda:1"; by default the best there is, and each process's own where there are
            several.
        compile: Whether the layers run through ``torch.compile``, or the name of a backend of it; by default on a CUDA
            device, where the run is so long that it pays. Where it fails, the run goes on without, with a warning. The
            numbers are the same to rounding.

    Raises:
        ConfigError: An unknown strategy, precision or backend; a device that is not there; a reference router whose
            blocks are too small.
        DataError: Empty or overlapping domains.
        ResultError: ``out`` holds a run of another configuration, of other data or precision, or a run and ``resume``
            is False; or the system refuses a write.
        TrainingError: A loss or gradient is not finite; the last checkpoint stays.
    """
    _check_precision(mixed_precision)
    check_compile(compile)
    check_device(device)
    check_strategy(config.strategy, config, config.domains if domains is None else [d.name for d in domains])
    folder = None if out is None else RunFolder(Path(out))
    if folder is not None:
        folder.check(config, resume, described_method(mixed_precision))
    processes = accelerator()
    if device is not None and processes.num_processes > 1:
        expected = "no device: each process has its own"
        raise ConfigError(f"device {device} for {processes.num_processes} processes", expected, "Leave it out.")
    data = load_domains(config) if domains is None else domains
    origin = described_run(data, mixed_precision)
    if folder is not None:
        folder.check(config, resume, origin)
    trainer = Trainer(config, data, processes, mixed_precision, device, compile)
    if folder is not None:
        if folder.state.exists():
            trainer.load_state(folder.state)
        if processes.is_main_process:
            folder.open(config, trainer.history, origin)
    _run_steps(trainer, folder, min(config.steps, stop_at or config.steps), progress and processes.is_main_process)
    final = trainer.evaluate()
    path = None
    if folder is not None and trainer.step == config.steps:
        path = folder.model
        _save_model(trainer, path)
        if processes.is_main_process:
            folder.close(origin)
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


def described_run(domains: Sequence[Domain], mixed_precision: str) -> dict[str, Any]:
    """What changes a run's numbers beside its configuration: the data, the precision and the version of the method."""
    return {**described_method(mixed_precision), "data": checksum(domains)}


def described_method(mixed_precision: str) -> dict[str, Any]:
    """Of that, what is known before there is data."""
    return {"mixed_precision": mixed_precision, "version": VERSIONS.get(mixed_precision)}


def check_device(device: str | torch.device | None) -> None:
    """Refuse a device that is not there.

    Raises:
        ConfigError: This machine has no such device, or no device has such a name.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        expected = "a device that this machine has"
        raise ConfigError(
            f"device {str(device)!r} ({first_sentence(error)})", expected, 'Choose "cpu", or leave it out.'
        ) from error


def _check_precision(mixed_precision: str) -> None:
    if mixed_precision not in PRECISIONS:
        raise ConfigError(f"mixed_precision {mixed_precision!r}", f"one of {', '.join(PRECISIONS)}", "Choose one.")


def _save_model(trainer: Trainer, path: Path) -> None:
    """Written beside and then moved: a folder of that name is a whole checkpoint, and says that the run is finished."""
    if trainer.accelerator.is_main_process and not path.exists():
        unfinished = path.with_suffix(".tmp")
        save_checkpoint(trainer.bridge.original_model, trainer.tokenizer, unfinished, torch.float32)
        os.replace(unfinished, path)
    trainer.accelerator.wait_for_everyone()


def _run_steps(trainer: Trainer, folder: RunFolder | None, end: int, progress: bool) -> None:
    config = trainer.config
    unigram = unigram_loss(trainer.data, trainer.validation, len(trainer.tokenizer))
    tokens_per_step = config.micro_batches * config.micro_batch * config.length
    started, first = time.perf_counter(), trainer.step
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *shown, TextColumn("{task.fields[status]}"), console=Console(stderr=True), disable=not progress
    ) as bar:
        task = bar.add_task(
            f"{config.strategy} seed {config.seed}", total=config.steps, completed=trainer.step, status=""
        )
        while trainer.step < end:
            made = trainer.train_step()
            step = trainer.step
            validate = step % config.validate_every == 0 or step == end
            if validate or step % config.log_every == 0:
                record: dict[str, Any] = {"step": step, "tokens": step * tokens_per_step}
                read = {key: made[key] for key in ("loss", "auxiliary", "dropped_slots", "lr")}  # waits for the device
                record["tokens_per_s"] = round((step - first) * tokens_per_step / (time.perf_counter() - started))
                loads = torch.stack(list(made["loads"].values())).cpu()
                record |= read | {"max_violation": [max_violation(load) for load in loads]}
                if validate:
                    record |= _validation_record(trainer.evaluate()) | {"unigram": unigram}
                trainer.history.append(record)
                if folder is not None and trainer.accelerator.is_main_process:
                    folder.add(record)
                bar.update(task, status=f"loss {record['loss']:.3f}  MaxVio {max(record['max_violation']):.2f}")
            bar.update(task, completed=step)
            if folder is not None and (step % config.checkpoint_every == 0 or step == end):
                trainer.save_state(folder.state)


def _validation_record(found: Evaluation) -> dict[str, Any]:
    # with one domain there is nothing to specialise in
    metrics = routing_metrics(found.trace) if len(found.losses) > 1 else use_metrics(found.trace)
    record = {"validation": found.losses, "routing": _columns(metrics)}
    gains = found.shared_direction
    return record if gains is None else record | {"shared_direction": _columns(gains)}


def _columns(frame: pd.DataFrame) -> dict[str, Any]:
    return {str(name): values for name, values in frame.to_dict("list").items()}
