"""Passes of any kind whose numbers do not depend on the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_interp.engine.cpu.batch_invariant import BatchInvariance
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks, check_attached


@contextmanager
def batch_invariant(moe: MoEHooks) -> Iterator[None]:
    """Inside the ``with``, a sequence's numbers are the same bits whatever other sequences of its length run with it.

    For ``run_with_cache``, ``run_with_hooks`` and the model's own passes. Linear maps have at least 16 rows and 16
    outputs, each expert at least 16 rows, and activations no remainder of a vector register: otherwise libraries add up
    in another order, or approximate in another way. Numbers differ from those of the model's own kernels by rounding.

    It holds for float32 on a processor, without padding. It was observed on every supported family but jamba, whose
    state space depends on the batch by rounding (tests hold this).

    Args:
        moe: Attached hooks.

    Raises:
        ConfigError: another device or number format.
    """
    check_attached(moe)
    invariance = BatchInvariance(moe)
    if not invariance.is_served:
        parameter = next(moe.bridge.original_model.parameters())
        raise ConfigError(
            f"batch-invariant passes in {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}",
            "float32 on a processor",
            "Leave it out: numbers then depend on the batch by rounding. Or run batches of one sequence.",
        )
    with invariance.experts(), invariance.operations():
        yield
