"""One optimiser step of the testbed, and the state that the next one depends on."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moe_interp.arch.routing_rule import at_least_float
from moe_interp.engine.eval_mode import eval_mode
from moe_interp.errors import ConfigError, MoEInterpError, ResultError, TrainingError
from moe_interp.hooks.attach import attach
from moe_interp.results.files import replacing
from moe_interp.results.seals import read_sealed, sealed_zip
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.domains.packing import training_sequences, validation_sequences
from moe_interp.testbed.evaluate import Evaluation, evaluate, token_losses
from moe_interp.testbed.model import bridge_model, build_model, model_tensors, train_tokenizer
from moe_interp.testbed.strategies.strategy import Batch, Hook, Loads, Records, Setting, recorded
from moe_interp.testbed.strategies.table import make_strategy
from moe_interp.testbed.training.compilation import (
    Compile,
    check_compile,
    chosen_backend,
    compile_or_warn,
    say_not_compiled,
)
from moe_interp.testbed.training.optimizers import make_optimizers, skip_steps
from moe_interp.testbed.training.step_numbers import StepNumbers
from moe_interp.testbed.training.training_model import TrainingModel, copy_sharing_tensors, router_hooks
from moe_interp.types import Layer

LONGEST_UNCHECKED = 1000  # steps whose numbers nobody asked for
RESTORE = "Restore it from a copy, or train anew in another folder."


class Trainer:
    """One run. ``train.train`` is the way in; the class keeps what a step and a checkpoint share.

    Args:
        config: What is trained.
        domains: Its data.
        accelerator: The processes that share the run out, and their devices; its precision is not used.
        mixed_precision: "no" or "bf16".
        device: Where the run's only process trains; the accelerator's choice by default.
        compile: As for ``train.train``.

    Attributes:
        bridge: A bridge of the model, for hooks.
        network: The same parameters as they are trained: see :mod:`moe_interp.testbed.training.training_model`.
    """

    def __init__(
        self,
        config: TestbedConfig,
        domains: Sequence[Domain],
        accelerator: Accelerator,
        mixed_precision: str = "no",
        device: str | torch.device | None = None,
        compile: Compile = None,
    ) -> None:
        _check_processes(config, accelerator)
        check_compile(compile)
        self.device = accelerator.device if device is None else torch.device(device)
        self.autocast = partial(_autocast, mixed_precision, self.device)
        self.config, self.domains, self.accelerator = config, tuple(domains), accelerator
        self.tokenizer = train_tokenizer(domains, config.vocab_size)
        self.data = training_sequences(
            domains,
            self.tokenizer,
            n_sequences=config.steps * config.micro_batches * config.micro_batch,
            length=config.length,
            shares=config.shares,
            mixed=config.mixed_sequences,
            domains_per_group=config.domains_per_step or config.domains_per_micro_batch,
            group=config.micro_batch * (config.micro_batches if config.domains_per_step else 1),
            seed=config.seed,
        )
        self.validation = validation_sequences(
            domains, self.tokenizer, n_per_domain=config.validation_sequences, length=config.length
        )
        model = build_model(config.model, len(self.tokenizer), config.seed)
        model.to(self.device)  # type: ignore[arg-type]
        self.optimizers = make_optimizers(model, config.optimizer, config.lr, config.muon_lr, config.weight_decay)
        self.base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        native = copy_sharing_tensors(model)
        self.bridge = bridge_model(model, self.tokenizer)
        self.model = self.bridge.original_model
        self.moe = attach(self.bridge, expert_outputs=False)
        self.network = TrainingModel(native, self.moe)
        self._replicated = _replicated(self.network, accelerator, self.device)
        setting = Setting(
            self.moe, config, tuple(d.name for d in domains), partial(accelerator.reduce, reduction="mean")
        )
        self.strategy = make_strategy(config.strategy, setting)
        self.bridge.train()
        self.network.train()
        self.backend = chosen_backend(compile, config, self.device)
        if self.backend is not None and self.strategy.has_varying_width:
            self.backend = None
            if compile is not None:
                say_not_compiled(f"routes of {config.strategy} are wider at one step than at another")
        self.step, self.history = 0, list[dict[str, Any]]()
        self.saved: Path | None = None
        self._unchecked: list[tuple[int, Tensor]] = []
        self._stopped = torch.zeros((), device=self.device)
        skip_steps(self.optimizers, self._stopped)

    def forward(
        self,
        tokens: Tensor,
        domain: Tensor,
        training: bool = True,
        logits_to_keep: int = 0,
        router_inputs: bool = False,
    ) -> tuple[Tensor, Records]:
        """Logits (of the last ``logits_to_keep`` positions; 0: of all) and what each router did, under the strategy.

        With ``router_inputs`` the records have what the routers read as well.
        Where the bridge has hooks, or the strategy has some that are not on routers, the pass goes through the bridge.
        """
        batch = Batch(tokens, domain, self.step, training)
        hooks, dropping = self.strategy.fwd_hooks(batch), self.strategy.dropping_hooks(batch)
        on_routers = None if self._is_hooked() else router_hooks(self.moe, hooks, dropping)
        if on_routers is None:
            return self._through_bridge(tokens, hooks, dropping, logits_to_keep, router_inputs)
        run = self._replicated if torch.is_grad_enabled() else self.network
        with self.autocast():
            options = {"compiled": training, "router_inputs": router_inputs}
            logits = run(tokens, on_routers, logits_to_keep=logits_to_keep, **options)
        return at_least_float(logits), self.network.records(tokens.shape)

    def _through_bridge(
        self,
        tokens: Tensor,
        hooks: Sequence[Hook],
        dropping: Sequence[Hook],
        logits_to_keep: int,
        router_inputs: bool,
    ) -> tuple[Tensor, Records]:
        if self.accelerator.num_processes > 1 and torch.is_grad_enabled():
            raise ConfigError(
                f"hooks elsewhere than on routers, on {self.accelerator.num_processes} processes",
                "hooks on routers, or one process",
                "Train in one process.",
            )
        options: dict[str, Any] = {"use_cache": False, "logits_to_keep": logits_to_keep}

        def logits() -> Tensor:
            with self.autocast():
                return self.model(tokens, **options).logits

        found, records = recorded(self.moe, logits, hooks, dropping, router_inputs)
        return at_least_float(found), records

    def _is_hooked(self) -> bool:
        """Whether anybody looks into the bridge."""
        return any(point.has_hooks() for point in self.bridge.hook_dict.values())

    def micro_batch(self, micro: int) -> tuple[Tensor, Tensor]:
        """Tokens and domain labels of a micro-batch of this step; nothing but its number decides which."""
        start = (self.step * self.config.micro_batches + micro) * self.config.micro_batch
        rows = slice(start, start + self.config.micro_batch)
        tokens, domain = (_on_device(a[rows], self.device) for a in (self.data.tokens, self.data.domain))
        return tokens, domain

    def train_step(self) -> StepNumbers:
        """One optimiser step: mean loss, auxiliary loss and dropped slots, the learning rate and each layer's load.

        It does not wait for the device. Where a number is not finite, this step and all later ones leave the weights
        as they are; the error comes when numbers are read, and before a checkpoint is written.
        """
        config, accelerator = self.config, self.accelerator
        factor = config.lr_factor(self.step)
        for optimizer, rates in zip(self.optimizers, self.base_lrs):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        # micro-batches are dealt out to the processes, so that the step is the same on any number of them
        mine = range(accelerator.process_index, config.micro_batches, accelerator.num_processes)
        self._compile(mine[0])
        # one micro-batch is the whole step
        measure = self.strategy.needs_step_load and config.micro_batches > 1
        step_load = self._load_of_step(mine) if measure else None
        means: list[Tensor] = []
        loads: dict[Any, Tensor] = {}
        for micro in mine:
            tokens, domain = self.micro_batch(micro)
            # gradients are averaged over processes once a step
            with nullcontext() if micro == mine[-1] else accelerator.no_sync(self._replicated):
                logits, records = self.forward(tokens, domain)
                loss = token_losses(logits, tokens).mean()
                auxiliary = self.strategy.auxiliary_loss(records, Batch(tokens, domain, self.step, True), step_load)
                ((loss + auxiliary) / len(mine)).backward()
            dropped = dropped_slots(records, config.model.top_k)
            means.append(torch.stack([value.detach().to(loss) for value in (loss, auxiliary, dropped)]) / len(mine))
            _add_loads(loads, records, len(mine))
        totals = accelerator.reduce(torch.stack(means).sum(0), "mean")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self._note(torch.stack([totals[0], totals[1], norm.to(totals)]))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        shared = self._over_processes(loads)
        self.strategy.after_step(shared)
        self.step += 1
        if len(self._unchecked) >= LONGEST_UNCHECKED:
            self.check()
        return StepNumbers(totals, self.check, lr=config.lr * factor, loads=shared)

    def _compile(self, micro: int) -> None:
        """Before the first step of this process, where the run is to be compiled."""
        if self.backend is None:
            return
        backend, self.backend = self.backend, None
        tokens, domain = self.micro_batch(micro)
        batch = Batch(tokens, domain, self.step, True)
        hooks = router_hooks(self.moe, self.strategy.fwd_hooks(batch), self.strategy.dropping_hooks(batch))
        if hooks is not None:
            compile_or_warn(self.network, backend, tokens, hooks, self.autocast, self.strategy.needs_step_load)

    @torch.no_grad()
    def _load_of_step(self, mine: range) -> Loads:
        loads: dict[Any, Tensor] = {}
        for micro in mine:
            _add_loads(loads, self.forward(*self.micro_batch(micro), logits_to_keep=1)[1], len(mine))
        return self._over_processes(loads)

    def _over_processes(self, loads: Loads) -> Loads:
        """The mean over processes, of all layers at once."""
        means = self.accelerator.reduce(torch.stack(list(loads.values())), "mean")
        return dict(zip(loads, means))

    def _note(self, numbers: Tensor) -> None:
        """Keep loss, auxiliary loss and norm for :meth:`check`; no weights change any more once one is not finite."""
        self._unchecked.append((self.step, numbers))
        self._stopped.copy_(torch.maximum(self._stopped, (~numbers.isfinite().all()).float()))

    def check(self) -> None:
        """Wait for the steps so far, and see whether their numbers are finite.

        Raises:
            TrainingError: One is not; the weights are those before that step.
        """
        steps, self._unchecked = self._unchecked, []
        if not steps:
            return
        for (step, _), found in zip(steps, torch.stack([numbers for _, numbers in steps]).tolist()):
            for name, value in zip(("loss", "auxiliary loss", "gradient's norm"), found):
                if not math.isfinite(value):
                    kept = f"The checkpoint {self.saved} is kept" if self.saved else "No checkpoint was written yet"
                    rate = self.config.lr * self.config.lr_factor(step)
                    raise TrainingError(
                        f"the {name} is {value} at step {step}, learning rate {rate:.3g}",
                        f"a finite {name}",
                        f"{kept}; start anew with a lower learning rate or a longer warm-up.",
                    )

    def evaluate(self) -> Evaluation:
        """Validation losses, routes and gains, under the strategy as it is outside training."""
        weights: dict[Layer, Tensor] = {k: router.weight() for k, router in self.network.routers.items()}
        forward = partial(self.forward, training=False, router_inputs=self.config.shared_direction)
        with eval_mode(self.bridge):
            self.network.eval()
            try:
                return evaluate(forward, self.validation, self.device, weights)
            finally:
                self.network.train()

    def save_state(self, path: Path) -> None:
        """Everything that the next step depends on; written beside and then moved, so a kill leaves the old one.

        Raises:
            TrainingError: A number of a step so far is not finite.
        """
        self.check()
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
        state = read_state(path, self.device)
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
        load = record.load() / n
        loads[layer] = loads[layer] + load if layer in loads else load


def _on_device(rows: np.ndarray, device: torch.device) -> Tensor:
    """Whole numbers on a device; to a CUDA device from pinned memory, for which nobody waits."""
    values = torch.from_numpy(rows)
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True).long()


def _replicated(network: TrainingModel, accelerator: Accelerator, device: torch.device) -> nn.Module:
    """The network; where several processes train it, averaging their gradients."""
    if accelerator.num_processes == 1:
        return network
    places = [device] if device.type != "cpu" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=places, broadcast_buffers=False)


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
