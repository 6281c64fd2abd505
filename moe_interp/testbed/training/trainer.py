"""One optimiser step of the testbed, and the state that the next one depends on."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from moe_interp.errors import ConfigError, MoEInterpError, ResultError, TrainingError
from moe_interp.hooks.attach import attach
from moe_interp.hooks.eval_mode import eval_mode
from moe_interp.results.files import replacing
from moe_interp.results.seals import read_sealed, sealed_zip
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.domains.packing import training_sequences, validation_sequences
from moe_interp.testbed.evaluate import Evaluation, evaluate, token_losses
from moe_interp.testbed.model import bridge_model, build_model, model_tensors, train_tokenizer
from moe_interp.testbed.strategies.strategy import Batch, Loads, Records, Setting, recorded
from moe_interp.testbed.strategies.table import make_strategy
from moe_interp.testbed.training.optimizers import make_optimizers

RESTORE = "Restore it from a copy, or train anew in another folder."


class Trainer:
    """One run. ``train.train`` is the way in; the class keeps what a step and a checkpoint share."""

    def __init__(
        self, config: TestbedConfig, domains: Sequence[Domain], accelerator: Accelerator, mixed_precision: str = "no"
    ) -> None:
        _check_processes(config, accelerator)
        self.autocast = partial(_autocast, mixed_precision, accelerator.device)
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
        self.saved: Path | None = None

    def forward(
        self, tokens: Tensor, domain: Tensor, training: bool = True, logits_to_keep: int = 0
    ) -> tuple[Tensor, Records]:
        """Logits (of the last ``logits_to_keep`` positions; 0: of all) and what each router did, under the strategy."""
        batch = Batch(tokens, domain, self.step, training)
        hooks, dropping = self.strategy.fwd_hooks(batch), self.strategy.dropping_hooks(batch)
        options: dict[str, Any] = {"use_cache": False, "logits_to_keep": logits_to_keep}

        def logits() -> Tensor:
            with self.autocast():
                return self.model(tokens, **options).logits

        found, records = recorded(self.moe, logits, hooks, dropping)
        return found.float(), records

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
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        self._check_finite({"loss": totals[0], "auxiliary loss": totals[1], "gradient's norm": norm}, factor)
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

    def _check_finite(self, numbers: Mapping[str, Any], factor: float) -> None:
        """Before the weights are touched, so that no checkpoint can hold what is not finite."""
        for name, value in numbers.items():
            if not math.isfinite(value):
                kept = f"The checkpoint {self.saved} is kept" if self.saved else "No checkpoint was written yet"
                raise TrainingError(
                    f"the {name} is {float(value)} at step {self.step}, learning rate {self.config.lr * factor:.3g}",
                    f"a finite {name}",
                    f"{kept}; start anew with a lower learning rate or a longer warm-up.",
                )

    def evaluate(self) -> Evaluation:
        """Validation losses and routes, under the strategy as it is outside training."""
        with eval_mode(self.bridge):
            return evaluate(partial(self.forward, training=False), self.validation, self.accelerator.device)

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
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with replacing(path) as file:
            file.write(sealed_zip(buffer.getvalue()))
        self.saved = path

    def load_state(self, path: Path) -> None:
        """Inverse of :meth:`save_state`.

        Raises:
            ResultError: The checkpoint belongs to another configuration, was damaged, or has no checksum.
        """
        state = read_state(path, self.accelerator.device)
        try:
            self._restore(state, path)
        except MoEInterpError:
            raise
        except Exception as error:  # tensors of other shapes, or none
            given = f"{str(path)!r} cannot be read as a checkpoint ({type(error).__name__}: {error})"
            raise ResultError(given, "a checkpoint of this run", RESTORE) from error

    def _restore(self, state: dict[str, Any], path: Path) -> None:
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
        self.step, self.history, self.saved = state["step"], state["history"], path


def read_state(path: Path, device: Any) -> dict[str, Any]:
    """What :meth:`Trainer.save_state` wrote.

    Raises:
        ResultError: the checkpoint was damaged, is without a checksum, or is not one of the testbed.
    """
    content = read_sealed(path, "a checkpoint", RESTORE)
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        if not isinstance(state, dict) or "fingerprint" not in state:
            raise TypeError("no state of a run")
    except Exception as error:  # torch and zip raise errors of any class
        given = f"{str(path)!r} cannot be read as a checkpoint ({type(error).__name__}: {error})"
        raise ResultError(given, "a checkpoint of the testbed", RESTORE) from error
    return state


def dropped_slots(records: Records, top_k: int) -> Tensor:
    """Share of the k slots a token that no expert filled, over all layers; 0 unless a strategy drops."""
    shares = [1 - (r.indices >= 0).sum() / (r.indices.shape[0] * r.indices.shape[1] * top_k) for r in records.values()]
    return torch.stack(shares).mean()


def _add_loads(loads: dict[Any, Tensor], records: Records, n: int) -> None:
    for layer, record in records.items():
        loads[layer] = loads.get(layer, torch.zeros(())) + record.load() / n


def _autocast(mixed_precision: str, device: torch.device) -> Any:
    """The forward pass in bfloat16, with weights, optimiser and losses in float32."""
    if mixed_precision == "no":
        return nullcontext()
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"mixed_precision {mixed_precision!r} on {device}", "a GPU that has bfloat16", 'Use "no".')
    return torch.autocast(device.type, torch.bfloat16)


def _check_processes(config: TestbedConfig, accelerator: Accelerator) -> None:
    if config.micro_batches % accelerator.num_processes:
        raise ConfigError(
            f"micro_batches={config.micro_batches} on {accelerator.num_processes} processes",
            "a multiple of the number of processes",
            "Change micro_batches or the number of processes.",
        )
