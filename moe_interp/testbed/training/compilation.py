"""Whether a run's layers are compiled, and the trial that shows whether they can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from moe_interp.errors import ConfigError
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.training.training_model import RouterHooks, TrainingModel
from moe_interp.types import Layer

DEFAULT_BACKEND = "inductor"
# Compiling takes a minute or so. Estimated, not measured: from here on a GPU has won it back.
COMPILE_FROM_TOKENS = 50_000_000

Compile = bool | str | None
"""True, False, the name of a backend of ``torch.compile``, or None for the choice of :func:`chosen_backend`."""


class NotCompiledWarning(UserWarning):
    """A run was to be compiled and goes on without."""


def check_compile(compile: Compile) -> None:
    """Refuse what is no backend.

    Raises:
        ConfigError: A name that ``torch.compile`` does not know.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if isinstance(compile, str) and compile not in known:
        raise ConfigError(f"compile={compile!r}", f"True, False or one of {', '.join(known)}", "Choose one.")
    if not isinstance(compile, (bool, str, type(None))):
        raise ConfigError(f"compile={compile!r}", "True, False or the name of a backend", "Choose one.")


def chosen_backend(compile: Compile, config: TestbedConfig, device: torch.device) -> str | None:
    """The backend that a run is compiled by, or None.

    By default a run is compiled on a CUDA device, if it reads so many tokens that it wins the time back. On a CPU it is
    compiled only where that is asked for.
    """
    if isinstance(compile, str):
        return compile
    if compile is None:
        tokens = config.steps * config.micro_batches * config.micro_batch * config.length
        compile = device.type == "cuda" and tokens >= COMPILE_FROM_TOKENS
    return DEFAULT_BACKEND if compile else None


def compile_or_warn(
    model: TrainingModel,
    backend: str,
    tokens: Tensor,
    hooks: Mapping[Layer, RouterHooks],
    autocast: Callable[[], AbstractContextManager[Any]],
    without_gradient: bool,
) -> None:
    """Compile a model's layers, and run them forwards and backwards once; leave them as they were if that fails.

    Args:
        model: Its gradients must be empty, and are afterwards.
        backend: Of ``torch.compile``.
        tokens: A micro-batch.
        hooks: The strategy's, which are not called.
        autocast: What the passes of training run in.
        without_gradient: Whether the run has passes without gradient as well.
    """
    idle = {layer: each.idle() for layer, each in hooks.items()}
    failure = None
    try:
        model.compile_layers(backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what compilers say of themselves
            if without_gradient:
                with torch.no_grad(), autocast():
                    model(tokens, idle, logits_to_keep=1)
            with autocast():
                logits = model(tokens, idle)
            records = model.records(tokens.shape).values()
            # back through all that the losses of training reach
            (logits.float().mean() + sum(record.logits.float().mean() for record in records)).backward()
    except Exception as error:  # compilers raise errors of any class
        model.run_eagerly()
        failure = error
    finally:
        model.forget()
        for parameter in model.parameters():
            parameter.grad = None
    if failure is not None:
        say_not_compiled(f"torch.compile with {backend!r} failed, {_reason(failure)}")


def say_not_compiled(why: str) -> None:
    """Warn that a run that was to be compiled is not."""
    warnings.warn(f"The run goes on without torch.compile: {why}", NotCompiledWarning, stacklevel=3)


def _reason(error: Exception) -> str:
    """The first line of an error, or two where the first only announces another error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    return " ".join([f"{type(error).__name__}:", *shown])
