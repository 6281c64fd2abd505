"""What one testbed run is: data, model, strategy, optimisation. Frozen, checked when made, hashed for resume."""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from moe_interp.errors import ConfigError
from moe_interp.testbed.model import ModelConfig, whole_fields

_COUNTS = ("length", "micro_batch", "micro_batches", "steps", "log_every", "validate_every", "checkpoint_every")
_POSITIVE = (*_COUNTS, "validation_sequences", "lr", "clip", "data_scale", "capacity_factor")
_FROM_ZERO = ("balance", "bias_rate", "z_coefficient", "weight_decay", "seed")
_SHARES = ("decay_from", "load_decay")
# came later than the first checkpoints: while they are as they were, a checkpoint's hash is the same without them
_LATER = ("domains_per_step", "shared_direction")


class TestbedConfig(BaseModel):
    """One training run.

    Args:
        model: Sizes and family.
        domains: Names of generated domains, ``code`` (Python's standard library), ``name=path`` of a JSONL file or
            folder of text, or ``name=hub:dataset[:column]`` for `datasets` (column "text" if not said).
        shares: Expected share of sequences of each domain; equal if None.
        strategy: Routing strategy, ``none`` or ``micro_batch``, ... (see ``strategies``).
        balance: Coefficient of the auxiliary balance loss, summed over layers.
        bias_rate, z_coefficient, capacity_factor: Of ``loss_free``, ``z_loss`` and ``capacity``.
        load_decay: Of the running means of ``global_running`` and ``expert_choice``.
        length, micro_batch, micro_batches: Tokens a sequence, sequences a micro-batch, and micro-batches an optimiser
            step **over all processes**, so that a run on more processes is the same run.
        mixed_sequences: Domains alternate within a sequence; otherwise a sequence has one.
        domains_per_micro_batch: Domain draws a micro-batch (1: pure micro-batches); None: every sequence its own.
        domains_per_step: The same of a whole optimiser step, all its micro-batches together.
        optimizer: AdamW, or Muon for matrices beside it. ``lr`` is AdamW's.
        shared_direction: Whether validations measure the routers' gain along the mean of their inputs.
        schedule: After ``warmup_steps``: cosine to a tenth, or constant to ``decay_from`` and then linear to 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    __test__ = False  # pytest: not a test class, whatever its name

    model: ModelConfig = ModelConfig()
    domains: tuple[str, ...] = ("arithmetic", "facts", "puzzles", "code")
    shares: tuple[float, ...] | None = None
    vocab_size: int = 768
    data_scale: float = 1.0
    strategy: str = "micro_batch"
    balance: float = 0.01
    bias_rate: float = 1e-3
    z_coefficient: float = 1e-3
    capacity_factor: float = 1.25
    load_decay: float = 0.9
    length: int = 256
    micro_batch: int = 12
    micro_batches: int = 1
    mixed_sequences: bool = False
    domains_per_micro_batch: int | None = None
    domains_per_step: int | None = None
    steps: int = 1000
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup_steps: int = 100
    decay_from: float = 0.6
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500
    validation_sequences: int = 24
    shared_direction: bool = True

    @model_validator(mode="before")
    @classmethod
    def _check_whole(cls, fields: Any) -> Any:
        return whole_fields(cls, fields)

    @model_validator(mode="after")
    def _check(self) -> TestbedConfig:
        bad = [f"{name}={getattr(self, name)}" for name in _POSITIVE if not getattr(self, name) > 0]
        bad += [f"{name}={getattr(self, name)}" for name in _FROM_ZERO if getattr(self, name) < 0]
        bad += [f"{name}={getattr(self, name)}" for name in _SHARES if not 0 < getattr(self, name) < 1]
        if bad:
            raise ConfigError(
                ", ".join(bad),
                "positive sizes and rates, coefficients and seed >= 0, decay_from and load_decay between 0 and 1",
                "Change the configuration.",
            )
        if not self.domains or (self.shares is not None and len(self.shares) != len(self.domains)):
            raise ConfigError(
                f"{len(self.shares or ())} shares for domains {self.domains}",
                "one share a domain",
                "Fix shares or domains.",
            )
        self._check_draws()
        if self.length > self.model.max_length:
            raise ConfigError(
                f"length={self.length}", f"at most the model's max_length={self.model.max_length}", "Lower the length."
            )
        return self

    def _check_draws(self) -> None:
        """Domain draws that can be had."""
        rooms = {"domains_per_micro_batch": self.micro_batch}
        rooms |= {"domains_per_step": self.micro_batch * self.micro_batches}
        given = {name: getattr(self, name) for name in rooms if getattr(self, name) is not None}
        bad = [f"{name}={n} of {rooms[name]} sequences" for name, n in given.items() if not 0 < n <= rooms[name]]
        if bad:
            raise ConfigError(", ".join(bad), "at least 1 draw, at most one a sequence", "Change it, or leave it out.")
        if len(given) > 1 or (given and self.mixed_sequences):
            others = [*given, *["mixed_sequences"] * self.mixed_sequences]
            raise ConfigError(" with ".join(others), "one way of drawing domains", "Leave one out.")

    def fingerprint(self) -> str:
        """A hash of everything: a checkpoint continues only the run that it came from."""
        unset = {name for name in _LATER if getattr(self, name) == type(self).model_fields[name].default}
        return blake2b(self.model_dump_json(exclude=unset).encode(), digest_size=8).hexdigest()

    def lr_factor(self, step: int) -> float:
        """The learning rate's factor at a step, in 0..1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "linear":
            return min(1.0, (1 - step / self.steps) / (1 - self.decay_from))
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
