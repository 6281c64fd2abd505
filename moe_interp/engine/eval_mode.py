"""Eval mode for as long as a model is measured, and every submodule's own mode back afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from moe_interp.hooks.attach import MoEHooks

P = ParamSpec("P")
M = TypeVar("M")
R = TypeVar("R")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside: no dropout, no router jitter, no random routes.

    Afterwards each submodule is in the mode it was in, also where some trained and others did not, and also after an
    exception or an interruption.

    Args:
        model: A bridge, or a transformers model.
    """
    # not all that a bridge wraps is among its own submodules
    wrapped: Any = getattr(model, "original_model", model)
    modes = {module: module.training for module in {*model.modules(), *wrapped.modules()}}
    try:
        for module in modes:
            # not module.eval(): a subclass may do more in it, and it reaches the submodules
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def in_eval_mode(function: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """A function of attached hooks, of which the model is in eval mode while it runs, and the calling thread's alone.

    See :func:`eval_mode`: a mode, like another forward, is every thread's.

    Raises:
        HookError: another thread is at work on the model.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> R:
        moe = args[0] if args else kwargs.get("moe")
        if not isinstance(moe, MoEHooks):
            return function(*args, **kwargs)  # which refuses it in its own words
        with moe.held(), eval_mode(moe.bridge):
            return function(*args, **kwargs)

    return run
