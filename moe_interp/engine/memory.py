"""What is free, what a pass holds, and what to do when it does not fit.

How much a whole pass takes is estimated in :func:`tokens_per_pass`; how much branches take, by the plans that pack them
(``moe_interp/routes/plan.py``).
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from moe_interp.engine.cpu.matmul import uses_onednn
from moe_interp.engine.policy import MOST_TOKENS, Policy, policy_of
from moe_interp.errors import ConfigError, DataError, warn
from moe_interp.hooks.attach import MoEHooks

CPU_TOKENS = MOST_TOKENS["cpu"]

COMPILED_BYTES = 128 * 2**20
"""At most so much is set aside for the code that oneDNN compiles: some .65 MiB a shape, of which a model has many."""

_CHUNK = 64  # positions that a linear attention takes together
_TOO_LARGE = object()

Result = TypeVar("Result")
Row = TypeVar("Row")
Key = TypeVar("Key")
Cell = TypeVar("Cell")


class HalvedBatchWarning(UserWarning):
    """A pass did not fit into memory, and was run in parts."""


class Memory:
    """The memory of one run: how much it may use, and what it learned where that was too much.

    Args:
        moe: Attached hooks.
        budget: Bytes; by default what is free, whenever it is asked.
    """

    def __init__(self, moe: MoEHooks, budget: int | None = None) -> None:
        self.policy, self.budget = policy_of(moe), budget
        self._most: dict[str, int] = {}  # by what is split, as many as fit once more did not
        self._unsaid: str | None = None
        self._is_said = False

    @classmethod
    def of(cls, moe: MoEHooks, given: int | Memory | None) -> Memory:
        """A budget's memory; a run's own as it is."""
        return given if isinstance(given, Memory) else cls(moe, given)

    @property
    def bytes(self) -> int:
        """What a pass may hold now."""
        return free_bytes(self.policy) if self.budget is None else self.budget

    def in_parts(self, work: Callable[[slice], Result], n: int, what: str) -> list[Result]:
        """The results of ``work`` on slices of ``range(n)``: one, or more where one does not fit into memory.

        Where memory runs out, half as many are taken from there on, and in later calls.

        Args:
            work: May be called again for what it has begun.
            n: How many there are.
            what: They are, in the plural: what a warning says, and by which later calls know them.

        Raises:
            torch.OutOfMemoryError: not even one fits; see :func:`out_of_memory_in_words`.
        """
        found: list[Result] = []
        start = 0
        while start < n:
            count = min(n - start, self._most.get(what, n))
            result = _tried(work, slice(start, start + count), is_last=count == 1)
            if result is _TOO_LARGE:
                self.halved(count, what)
            else:
                found.append(result)
                start += count
        return found

    def in_halves(
        self,
        rows: list[Row],
        keys: list[Key],
        what: str,
        together: Callable[[list[Row], list[Key]], Iterator[tuple[Key, Cell]]],
        joined: Callable[[list[Cell]], Cell],
    ) -> Iterator[tuple[Key, Cell]]:
        """Cells of some rows, one a key; where the rows do not fit into memory together, those of two halves, joined.

        Args:
            rows: What is cut in halves.
            keys: Of the cells that are wanted, in the order in which they are made.
            what: The rows are, in the plural.
            together: Makes the cells of some rows, in the order of the keys.
            joined: Makes a cell of all rows of the cells of some each.

        Raises:
            torch.OutOfMemoryError: not even one row fits.
        """
        n_done = 0
        if len(rows) <= self._most.get(what, len(rows)):
            try:
                for key, cell in together(rows, keys):
                    yield key, cell
                    n_done += 1
                return
            except Exception as error:
                if not is_out_of_memory(error) or len(rows) == 1:
                    raise
            self.halved(len(rows), what)
        left, middle = keys[n_done:], (len(rows) + 1) // 2
        parts = rows[:middle], rows[middle:]
        halves = [dict(self.in_halves(part, left, what, together, joined)) for part in parts]
        self.say()
        for key in left:
            yield key, joined([half[key] for half in halves])

    def halved(self, count: int, what: str) -> None:
        """So many did not fit: what torch keeps for later is given back, and half as many are taken from now on."""
        self._most[what] = min(self._most.get(what, count), (count + 1) // 2)
        self._unsaid = f"{count} {what} at once do not fit into memory"
        if not self.policy.is_processor and torch.cuda.is_available():
            torch.cuda.empty_cache()  # its gaps may be what was missing

    def say(self) -> None:
        """Warn, once a run, that something was halved; to be called where the user's line can be found."""
        if self._unsaid is not None and not self._is_said:
            self._is_said = True
            text = f"{self._unsaid}: fewer are taken, with the same results. A lower memory_budget spares the attempts."
            warn(text, HalvedBatchWarning)


def free_bytes(policy: Policy) -> int:
    """What a run may use on a device, by default: see :meth:`Policy.usable`."""
    if policy.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(policy.device)
        # blocks that torch keeps without a tensor in them serve as well
        kept = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        return policy.usable(int(free) + kept, int(total))
    memory = psutil.virtual_memory()
    return policy.usable(int(memory.available), int(memory.total))


def without_compiled(budget: int, parameter: Tensor) -> int:
    """What is left of a memory budget beside compiled code, for a model with such parameters; two thirds at least."""
    is_served = uses_onednn() and parameter.device.type == "cpu" and parameter.dtype == torch.float32
    return budget - min(budget // 3, COMPILED_BYTES) if is_served else budget


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no class of its own for it on a processor
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def out_of_memory_in_words() -> Iterator[None]:
    """An error for memory that ran out becomes one in words. Also a decorator.

    Raises:
        DataError: in its place.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold what did not fit
        raise DataError(
            f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})",
            "room for the model and one sequence",
            "Take shorter sequences, a lower precision, or a device with more memory.",
        ) from error


def tokens_per_pass(
    moe: MoEHooks,
    width: int,
    memory_budget: int | None = None,
    *,
    kept_layers: int = 0,
    kept_tokens: int = 0,
    predictions_per_token: float = 0.0,
    slots: int = 0,
) -> int:
    """Tokens that fit into a budget, from an estimate of what a layer computes and what is kept (derived).

    Args:
        moe: Attached hooks.
        width: Longest sequence.
        memory_budget: Bytes; by default what is free, see :func:`free_bytes`.
        kept_layers: Layers whose prefixes are kept beside the pass.
        kept_tokens: Tokens that there are at most to keep them of.
        predictions_per_token: Predictions read for each token of a pass, at most.
        slots: Experts that a token uses at most, where that is more than the router takes.

    Raises:
        ConfigError: a budget in which not even one sequence fits.
    """
    policy, parameter = policy_of(moe), next(moe.bridge.original_model.parameters())
    budget = memory_budget if memory_budget is not None else free_bytes(policy)
    spec, cfg = moe.spec(moe.layers[0]), moe.bridge.cfg
    heads = int(getattr(cfg, "n_heads", 0) or 0)
    # experts that read a scaled input run on every token, whatever the router chooses
    slots = spec.n_experts if spec.weight_on_input else max(slots, spec.top_k)
    expert = max(6 * spec.d_expert + spec.d_model, spec.d_expert + 4 * spec.d_model)
    mlp = max(int(getattr(cfg, "d_mlp", 0) or 0), slots * expert)
    mixer = _recurrent_numbers(moe.bridge.original_model, width)
    logits = math.ceil(2 * predictions_per_token * int(getattr(cfg, "d_vocab", 0) or 0))  # and their log-probabilities
    size = max(4, parameter.element_size())
    # residual, norms, projections and their temporaries; attention scores of one layer in steps
    per_token = size * (24 * spec.d_model + mlp + max(6 * heads * width, mixer) + logits)
    kept = size * 4 * kept_layers * spec.d_model  # the input, the norms' and the attention's answers

    def fitting(available: int) -> int:
        tokens = available // (per_token + kept)
        return tokens if tokens <= kept_tokens else (available - kept * kept_tokens) // per_token

    if fitting(budget) < width:
        expected = f"at least {(per_token + kept) * width / 2**20:.3f} MiB for one sequence of {width} tokens"
        if memory_budget is None:
            given = f"{budget / 2**20:.3f} MiB that may be used of what is free on {policy.device}"
            raise ConfigError(given, expected, "End what else uses its memory, or leave the longest items out.")
        given = f"a memory budget of {budget / 2**20:.3f} MiB"
        raise ConfigError(given, expected, "Raise memory_budget, or leave the longest items out.")
    tokens = max(fitting(without_compiled(budget, parameter)), width)
    return int(min(tokens, max(policy.most_tokens, width)))


def _recurrent_numbers(model: Any, width: int) -> int:
    """What a recurrent layer of the slow, general kind holds for a token, at most; 0 where there is none.

    Mamba keeps its state for every position, a linear attention products of all pairs in a chunk of 64.
    """
    config = model.config.get_text_config()
    # of the second kind of Mamba, which has heads, only the ends of chunks are kept
    states = 0 if hasattr(config, "mamba_n_heads") else getattr(config, "mamba_d_state", 0)
    inner = getattr(config, "mamba_expand", 0) * config.hidden_size
    heads = getattr(config, "linear_num_value_heads", 0)
    widest = max(getattr(config, "linear_key_head_dim", 0), getattr(config, "linear_value_head_dim", 0))
    filled = -(-width // _CHUNK) * _CHUNK / width
    return max(6 * inner * states, math.ceil(filled * heads * (10 * widest + 4 * _CHUNK)))


def _tried(work: Callable[[slice], Any], part: slice, is_last: bool) -> Any:
    """What the work gives, or that it is too large; nothing that it held is left then."""
    try:
        return work(part)
    except Exception as error:
        if is_last or not is_out_of_memory(error):
            raise
    return _TOO_LARGE
