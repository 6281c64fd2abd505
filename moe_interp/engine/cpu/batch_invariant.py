"""float32 products that do not depend on the batch: a row's result is the same bits whatever other rows there are.

Libraries of matrix products have kernels of their own for a few rows, which add up in another order. From 16 rows on
the order depends on the matrices alone (observed with Intel's MKL at widths from 8 to 2048; attention, a product for
each row and head, never depends on the batch). So every product here has at least 16 rows, the missing ones zeros:
those of the linear maps, and those of each expert.

What remains: torch computes the last elements of a tensor, fewer than 32, by another approximation of exp than the
others, so that activations of a width that 32 does not divide depend on the rows after them, by rounding; and so does a
map to a single number (the gate of a shared expert).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_interp.arch.expert_functions import StackedExperts
from moe_interp.arch.grouped_products import RowGroups, can_be_grouped
from moe_interp.engine.policy import policy_of
from moe_interp.engine.replaced_forward import swapped_forwards
from moe_interp.hooks.attach import MoEHooks

FEWEST_ROWS = 16
_LANES = 32
_FEW = 128  # ids of experts
_ACTIVATIONS = {
    nn.functional.silu, nn.functional.gelu, nn.functional.softplus, torch.sigmoid, torch.tanh, torch.exp,
    torch.nn.functional.sigmoid, torch.nn.functional.tanh, Tensor.sigmoid, Tensor.tanh, Tensor.exp,
}  # fmt: skip
BATCH_INVARIANT = "moe_interp_batch_invariant"


class BatchInvariance:
    """A model's float32 passes on a processor with products that do not depend on the batch; any other's as they are.

    Args:
        moe: Attached hooks.
    """

    def __init__(self, moe: MoEHooks) -> None:
        policy = policy_of(moe)
        self.is_served = policy.is_processor and policy.dtype == torch.float32
        readable = [spec.experts for layer in moe.layers if (spec := moe.spec(layer)).unreadable is None]
        stacked = [experts for experts in readable if not getattr(experts, "_is_expert_parallel", False)]
        configs: list[Any] = [getattr(experts, "config", None) for experts in stacked] if self.is_served else []
        native = [c for c in configs if getattr(c, "_experts_implementation", None) == "grouped_mm"]
        self._configs: dict[int, Any] = {id(config): config for config in native}
        padded = {id(experts) for experts in stacked if id(getattr(experts, "config", None)) in self._configs}
        # what calls products on weights of its own, and is not padded as a whole
        self._holders = [
            module
            for module in moe.bridge.original_model.modules()
            if id(module) not in padded
            and type(module) not in (nn.Linear, nn.Embedding)
            and any(weight.ndim > 1 for weight in module.parameters(recurse=False))
        ]
        self._linears = [m for m in moe.bridge.original_model.modules() if type(m) is nn.Linear]

    @contextmanager
    def experts(self) -> Iterator[None]:
        """Inside the ``with``, stacked experts have at least 16 rows each; an implementation that was chosen stays."""
        try:
            for config in self._configs.values():
                config._experts_implementation = BATCH_INVARIANT
            yield
        finally:
            for config in self._configs.values():
                config._experts_implementation = "grouped_mm"

    @contextmanager
    def operations(self) -> Iterator[None]:
        """Inside the ``with``, in passes of whatever size: linear maps as :meth:`products` has them, those to a single
        number too, and activations without a remainder."""
        with _PaddedOperations() if self.is_served else nullcontext():
            yield

    @contextmanager
    def products(self, n_rows: int) -> Iterator[None]:
        """Around one pass of ``n_rows`` tokens, inside of :meth:`experts`: its linear maps have at least 16 rows.

        Modules get another forward: a mode of torch's would look at every operation of the pass, which costs more than
        the products. It is there only inside of modules that call products on weights of their own.
        """
        forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        if self.is_served and n_rows < FEWEST_ROWS:
            plain = [m for m in self._linears if not {"forward", "_hf_hook"} & m.__dict__.keys()]
            others = [m for m in self._linears if {"forward", "_hf_hook"} & m.__dict__.keys()]
            forwards += [(module, partial(_linear, module)) for module in plain]
            forwards += [(module, _with_padding(module.forward)) for module in (*self._holders, *others)]
        with swapped_forwards(forwards):
            yield


def _linear(native: nn.Linear, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
    rows = input.numel() // input.shape[-1]
    if not 0 < rows < FEWEST_ROWS or input.dtype != torch.float32:
        return nn.functional.linear(input, native.weight, native.bias)
    # shape: (..., d_in) -> (row, d_in), padded
    flat = nn.functional.pad(input.reshape(rows, -1), (0, 0, 0, FEWEST_ROWS - rows))
    return nn.functional.linear(flat, native.weight, native.bias)[:rows].view(*input.shape[:-1], -1)


def _with_padding(native: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _PaddedLinear():
            return native(*args, **kwargs)

    return forward


class _PaddedLinear(TorchFunctionMode):
    """``torch.nn.functional.linear`` of fewer than 16 rows is done with 16."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear and args and isinstance(args[0], Tensor):
            rows = args[0]
            if rows.dtype == torch.float32 and 0 < (n := rows.shape[:-1].numel()) < FEWEST_ROWS:
                # shape: (..., d_in) -> (row, d_in), padded
                flat = nn.functional.pad(rows.reshape(n, -1), (0, 0, 0, FEWEST_ROWS - n))
                return func(flat, *args[1:], **(kwargs or {}))[:n].view(*rows.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


class _PaddedOperations(_PaddedLinear):
    """Linear maps have at least 16 rows and 16 outputs, activations a multiple of 32 elements."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not (args and isinstance(args[0], Tensor) and args[0].dtype == torch.float32 and args[0].numel()):
            return super().__torch_function__(func, types, args, kwargs)
        value, n = args[0], args[0].numel()
        if func in _ACTIVATIONS and not (kwargs or {}).get("inplace"):
            # strided tensors have a kernel of their own
            flat = nn.functional.pad(value.reshape(-1), (0, -n % _LANES)).contiguous()
            return func(flat, *args[1:], **(kwargs or {}))[:n].view(value.shape)
        if func is nn.functional.linear and len(args) > 1 and len(args[1]) == 1 and not (kwargs or {}):
            bias = [nn.functional.pad(b, (0, FEWEST_ROWS - 1)) for b in args[2:] if b is not None]
            weight = nn.functional.pad(args[1], (0, 0, 0, FEWEST_ROWS - 1))
            return super().__torch_function__(func, types, (value, weight, *bias))[..., :1]
        return super().__torch_function__(func, types, args, kwargs)


def batch_invariant_experts(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of a module's experts, each with at least 16 rows.

    Args:
        module: Of transformers' stacked experts.
        hidden: ``[token, d_in]``, at least one token.
        indices, weights: ``[token, slot]``, without empty slots.

    Returns:
        ``[token, d_out]``.
    """
    experts = StackedExperts(module)
    place, groups = (_few_places if indices.numel() <= _FEW else _places)(indices.flatten(), experts.n_experts)
    rows = hidden.new_zeros(len(groups.experts), hidden.shape[1])
    rows[place] = hidden.repeat_interleave(indices.shape[1], 0)
    if can_be_grouped(rows, *experts.stacks) and not experts.is_watched:
        outputs = experts.output_of_groups(experts.hidden_of_groups(rows, groups), groups)
    else:
        outputs = torch.cat([experts.output(experts.hidden(rows[some], e), e) for some, e in groups.each()])
    # shape: (row, d_out), sorted by expert -> (token, d_out)
    return nn.functional.embedding_bag(
        place.view(indices.shape), outputs, per_sample_weights=weights.to(hidden.dtype), mode="sum"
    )


def _places(ids: Tensor, n_experts: int) -> tuple[Tensor, RowGroups]:
    """Where each id's row stands among rows that are sorted by expert, each expert with room for at least 16."""
    order = ids.argsort(stable=True)
    sizes = torch.bincount(ids, minlength=n_experts)
    room = torch.where(sizes > 0, sizes.clamp(min=FEWEST_ROWS), 0)
    ends = room.cumsum(0)
    # after the room of the experts before its own
    shift = (ends - room) - (sizes.cumsum(0) - sizes)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(ids), device=ids.device) + shift[ids[order]]
    return place, RowGroups(torch.arange(n_experts, device=ids.device).repeat_interleave(room), ends.int())


def _few_places(ids: Tensor, n_experts: int) -> tuple[Tensor, RowGroups]:
    """As :func:`_places`, by Python: for a few ids torch's calls cost more than what they compute."""
    members: list[list[int]] = [[] for _ in range(n_experts)]
    for number, expert in enumerate(ids.tolist()):
        members[expert].append(number)
    place, of, ends = [0] * len(ids), list[int](), list[int]()
    for expert, own in enumerate(members):
        for row, number in enumerate(own, start=len(of)):
            place[number] = row
        of += [expert] * (max(len(own), FEWEST_ROWS) if own else 0)
        ends.append(len(of))
    groups = RowGroups(torch.tensor(of, device=ids.device), torch.tensor(ends, dtype=torch.int32, device=ids.device))
    return torch.tensor(place, device=ids.device), groups


ALL_EXPERTS_FUNCTIONS.register(BATCH_INVARIANT, batch_invariant_experts)
