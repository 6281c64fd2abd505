"""The options of a tuning run, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from moe_interp.checks import check_seed, check_whole
from moe_interp.errors import ConfigError
from moe_interp.experiments.router_tuning.objectives import OBJECTIVES
from moe_interp.routes import GumbelTopK, RouteSampler

SCHEDULES = ("constant", "linear", "cosine")
CLASSES = {"fragile": (0.0, 0.5), "middle": (0.5, 0.9), "confident": (0.9, math.inf)}
PUBLISHED = GumbelTopK(tau=0.1, pool=32)
LARGEST = 1e6  # of a learning rate, beta and the like: beyond it float32 overflows in a step


@dataclass(frozen=True)
class TuningOptions:
    """How routers are tuned; see :func:`.experiment.tune_router` for what each means."""

    objective: str = "epo"
    select: float | str | None = 0.1
    sampler: RouteSampler = PUBLISHED
    n_routes: int = 32
    beta: float = 0.1
    temperature: float = 1.0
    reference: str | None = "start"
    lr: float = 3e-4
    schedule: str = "constant"
    warmup: int = 0
    batch_size: int = 16
    epochs: int = 1
    max_steps: int | None = None
    weight_decay: float = 0.0
    clip: float | None = 1.0
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("reference", self.reference, ("start", None))
        for name in ("n_routes", "batch_size", "epochs"):
            check_whole(getattr(self, name), name, 1)
        for name in ("max_steps", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) is not None:
                check_whole(getattr(self, name), name, 1)
        check_whole(self.warmup, "warmup", 0)
        check_seed(self.seed)
        for name in ("beta", "temperature", "lr", "clip"):
            value = getattr(self, name)
            if not (name == "clip" and value is None) and not (_is_finite(value) and 0 < value <= LARGEST):
                raise ConfigError(f"{name}={value!r}", f"a number above 0, at most {LARGEST:g}", "Correct it.")
        if not (_is_finite(self.weight_decay) and 0 <= self.weight_decay <= LARGEST):
            expected = f"a number of at least 0, at most {LARGEST:g}"
            raise ConfigError(f"weight_decay={self.weight_decay!r}", expected, "Correct it.")
        is_class = isinstance(self.select, str) and self.select in CLASSES
        if not (self.select is None or is_class or (_is_finite(self.select) and self.select >= 0)):  # type: ignore[operator]
            expected = f"nats that a token's cross-entropy must exceed, one of {', '.join(CLASSES)}, or None for all"
            raise ConfigError(f"select={self.select!r}", expected, "Tokens are also chosen by a sequence's own mask.")
        if isinstance(self.sampler, type) or not hasattr(self.sampler, "sample"):
            raise ConfigError(
                f"sampler={self.sampler!r}", "a sampler, such as GumbelTopK()", "Make one, with brackets."
            )

    def is_selected(self, ce: Any) -> Any:
        """``[token]`` bool: which tokens are trained on, by their cross-entropy under the untuned model."""
        if self.select is None:
            return ce.isfinite()
        if isinstance(self.select, str):
            low, high = CLASSES[self.select]
            p = (-ce).exp()
            return (p >= low) & (p < high)
        return ce > self.select

    def n_steps(self, n_tokens: int) -> int:
        """Steps of the run: ``ceil(tokens / batch_size)`` an epoch, at most ``max_steps``."""
        steps = self.epochs * self.steps_per_epoch(n_tokens)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def steps_per_epoch(self, n_tokens: int) -> int:
        return -(-n_tokens // self.batch_size)

    def rate(self, step: int, n_steps: int) -> float:
        """The learning rate of a step, counted from 0: a linear warm-up, then the schedule down to 0 at the end."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, n_steps - self.warmup)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.lr * factor


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        raise ConfigError(f"{name}={value!r}", f"one of {', '.join(map(repr, known))}", "Choose one.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
