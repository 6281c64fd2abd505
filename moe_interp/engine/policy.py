"""Which way serves a model: one object for each attached model, device and number format, that makes every such choice.

The ways themselves stand in their own files, and ask here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from moe_interp.arch.offload import device_of
from moe_interp.engine.cpu.matmul import ONEDNN_IS_FASTER
from moe_interp.hooks.attach import MoEHooks

FUSED_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Nats by which fused attention may differ from TransformerLens' steps; other number formats keep the steps."""

SHARED_KEYS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Share of the largest logit by which branches over shared keys may differ from the plain forward; some families cast
to float32. Other number formats copy the keys."""


class GridTolerance(NamedTuple):
    """How far a grid's logits may be from the plain forward's when it is tried.

    Attributes:
        share: Of the largest logit.
        of_all: Whether all tokens that are tried must be that near, or half of them.
    """

    share: float
    of_all: bool


GRID_TOLERANCE = {
    torch.float64: GridTolerance(1e-6, of_all=True),
    torch.float32: GridTolerance(1e-4, of_all=True),
    torch.bfloat16: GridTolerance(0.06, of_all=False),
    torch.float16: GridTolerance(0.02, of_all=False),
}
"""At half precision every layout rounds otherwise, and near-ties of later routers change the route of many tokens."""


class GridShares(NamedTuple):
    """The least share of a grid's places (every route at every position) from which a grid replaces compact rows.

    A place costs half of what a branch costs in compact rows, and compiled a fifth (see docs/benchmarks.md).
    """

    plain: float
    compiled: float


GRID_SHARES = {"cuda": GridShares(0.5, 0.25)}
"""By kind of device; others run compact rows. Tests and benchmarks write to it."""

LOOP_FROM_ROWS = 16 if ONEDNN_IS_FASTER else 48
"""From how many rows an expert a processor's loop over experts is faster than transformers' grouped product."""
LOOP_FROM_WORK = 2**23
"""From how many multiplications an expert it is."""

MOST_WORKERS = 4
"""Passes that run side by side on a processor, at most: Python runs one thread at a time."""

MOST_TOKENS = {"cpu": 2048, "cuda": 256 * 2048}
"""Tokens of a pass at most; larger ones fall out of a processor's caches."""

RESERVED_BYTES, RESERVED_SHARE = 2**29, 0.05
"""What is left free on an accelerator: the larger of 512 MiB and a twentieth of its memory.

Kernels are loaded at their first call, and the libraries of matrix products take a workspace for each stream (cuBLAS
32 MiB on an H100): together some hundred MiB that no tensor shows. torch's allocator hands out blocks of 2 and 20 MiB
and cannot join the gaps between them: at the sizes of a pass, a few per cent."""

PROCESSOR_SHARE = 0.5
"""Of a processor's free memory: other programs use it, and a system that runs out ends processes without an error."""


class AtOnce(NamedTuple):
    """As much as keeps a device busy; more would only leave the processor's caches.

    Attributes:
        branches: Branches of a group; a third where they copy their keys, which leave the caches sooner.
        logits_bytes: Logits that are held together.
        scores: Attention scores over shared keys.
        tokens_bytes: Experts' outputs, and block outputs of the routes.
    """

    branches: int
    logits_bytes: int
    scores: int
    tokens_bytes: int = 2**28


AT_ONCE = {"cpu": AtOnce(4608, 3 * 2**24, 2**18), "cuda": AtOnce(16384, 2**29, 2**26, 2**32)}


@dataclass(frozen=True)
class Policy:
    """Which of the engine's ways serve a model on its device.

    Attributes:
        device: Where the model reads its tokens.
        dtype: Of its first weight.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def is_processor(self) -> bool:
        return self.device.type == "cpu"

    @property
    def has_memory_of_its_own(self) -> bool:
        return self.device.type == "cuda"

    @property
    def fused_tolerance(self) -> float | None:
        """Nats by which fused attention may differ when it is tried; None where it is not."""
        return FUSED_TOLERANCE.get(self.dtype)

    @staticmethod
    def shared_keys_tolerance(dtype: torch.dtype) -> float | None:
        """Share of the largest logit (of a format that may be another than the weights') by which shared keys may
        differ when tried; None where keys are copied."""
        return SHARED_KEYS_TOLERANCE.get(dtype)

    @staticmethod
    def grid_tolerance(dtype: torch.dtype) -> GridTolerance | None:
        """How far a grid may be from the plain forward when tried; None where it is not."""
        return GRID_TOLERANCE.get(dtype)

    def takes_grid(self, share: float, *, compiled: bool = False) -> bool:
        """Whether branches run as a grid, if the model can.

        Args:
            share: How many of the grid's places are scored.
            compiled: Whether its layers are.
        """
        least = GRID_SHARES.get(self.device.type)
        return least is not None and share >= (least.compiled if compiled else least.plain)

    @property
    def shortens_modules(self) -> bool:
        """Whether norms and experts run in equal forms that are faster on a processor.

        At lower precision the loop over experts rounds its sum over slots more often than the grouped product.
        """
        return self.is_processor and self.dtype == torch.float32

    def loops_experts(self, rows: float, work_a_row: float) -> bool:
        """Whether experts run one after the other, in the place of transformers' grouped product.

        Args:
            rows: That an expert gets, on average.
            work_a_row: Multiplications.
        """
        return self.shortens_modules and rows >= LOOP_FROM_ROWS and rows * work_a_row >= LOOP_FROM_WORK

    @property
    def most_workers(self) -> int:
        """Passes that may run side by side where nothing else is on the model."""
        return min(torch.get_num_threads(), MOST_WORKERS) if self.is_processor else 1

    @property
    def at_once(self) -> AtOnce:
        """Caps of what a pass of branches holds together, whatever the memory budget."""
        return AT_ONCE.get(self.device.type, AT_ONCE["cpu"])

    @property
    def most_tokens(self) -> int:
        """Tokens of a whole pass at most, whatever the memory budget."""
        return MOST_TOKENS.get(self.device.type, MOST_TOKENS["cuda"])

    def usable(self, free: int, total: int) -> int:
        """Bytes that a run may use by default."""
        if not self.has_memory_of_its_own:
            return int(free * PROCESSOR_SHARE)
        return max(0, free - max(RESERVED_BYTES, int(total * RESERVED_SHARE)))

    def __str__(self) -> str:
        kind, name = self.device.type, str(self.dtype).removeprefix("torch.")
        tried = "fused in isolation and over shared keys in branches, where a trial agrees"
        attention = tried if self.fused_tolerance is not None else "step by step, with copies of the keys in branches"
        experts = f"a loop from {LOOP_FROM_ROWS} rows each" if self.shortens_modules else "transformers' own"
        workers = f"{self.most_workers} pass{'es' if self.most_workers > 1 else ''} side by side"
        branches = (
            self.at_once.branches if self.shared_keys_tolerance(self.dtype) is not None else self.at_once.branches // 3
        )
        grid = "compact rows"
        if self.device.type in GRID_SHARES:
            grid += f", or a grid where {GRID_SHARES[self.device.type].plain:.0%} of its places are scored"
        share = f"{PROCESSOR_SHARE:.0%} of what is free"
        if self.has_memory_of_its_own:
            share = f"what is free but for {RESERVED_BYTES / 2**30:g} GiB or {RESERVED_SHARE:.0%}"
        return (
            f"On {kind} in {name}: attention {attention}; branches in {grid}; experts by {experts}; {workers}, "
            f"{branches} branches and {self.most_tokens} tokens at once; memory: {share}"
        )


_made: WeakKeyDictionary[MoEHooks, Policy] = WeakKeyDictionary()


def policy_of(moe: MoEHooks) -> Policy:
    """The policy of an attached model; another one once the model has moved or changed its number format."""
    model = moe.bridge.original_model
    device, dtype = device_of(model), next(model.parameters()).dtype
    made = _made.get(moe)
    if made is None or (made.device, made.dtype) != (device, dtype):
        made = _made[moe] = Policy(device, dtype)
    return made
