"""What is recorded, and how the model is run for it: checked options, before anything is read or run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from moe_interp.checks import check_seed, check_whole
from moe_interp.errors import ConfigError, HookError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.passes import stack_of
from moe_interp.types import Layer

PART_BYTES = 2**26
"""What a part holds by default, in memory: 64 MiB."""
FORMATS = ("parquet", "npz")
NEEDED = {"norms": "norms", "margin": "logits"}  # table of counts -> the field that it needs
HOOKS = {
    "expert_indices": "expert_indices",
    "expert_weights": "expert_weights",
    "router_logits": "router_logits",
    "router_inputs": "router_in",
    "expert_norms": "expert_out",
}
"""Field of a trace -> bare name of the hook that it is read at."""


@dataclass(frozen=True)
class CaptureOptions:
    """What is recorded of which layers.

    Attributes:
        layers: Labels of one stack.
        logits, inputs, norms, predictions: What is recorded beside routes and weights.
        generate: New tokens of each sequence.
        temperature, top_p, seed: How they are drawn.
        pad, batch_size, batch_invariant: How sequences are batched.
        tables: Tables of counts; None for a trace, () and names for counts of use alone and more.
        part_bytes: Of a part, in memory.
        format: Of a part's file.
    """

    layers: tuple[Layer, ...]
    logits: bool
    inputs: bool
    norms: bool
    predictions: bool
    generate: int
    temperature: float
    top_p: float
    seed: int
    pad: bool
    batch_size: int | None
    batch_invariant: bool
    tables: tuple[str, ...] | None
    all_tables: bool
    part_bytes: int
    format: str

    @property
    def stack(self) -> str:
        """ "encoder" or "decoder"; "" in a model with one stack."""
        return stack_of(self.layers[0])

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers' indices in their stack."""
        return tuple(layer[1] if isinstance(layer, tuple) else layer for layer in self.layers)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a trace that hooks give."""
        wanted = {"router_logits": self.logits, "router_inputs": self.inputs, "expert_norms": self.norms}
        return tuple(name for name in HOOKS if wanted.get(name, True))

    def token_bytes(self, moe: MoEHooks) -> int:
        """What is kept of a token, in memory."""
        found = 24
        for layer in self.layers:
            spec = moe.spec(layer)
            slots = spec.top_k * (12 if self.norms else 8)
            found += slots + 4 * (spec.n_experts * self.logits + spec.d_model * self.inputs)
        return found

    def plan(self) -> dict[str, Any]:
        """What a stored capture is known by, apart from model and sequences; batches are not part of it."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed} if self.generate else {}
        kept = {"accumulate": "all" if self.all_tables else list(self.tables)} if self.tables is not None else {}
        return {
            "layers": [list(layer) if isinstance(layer, tuple) else layer for layer in self.layers],
            "logits": self.logits,
            "inputs": self.inputs,
            "norms": self.norms,
            "predictions": self.predictions,
            "generate": self.generate,
            "batch_invariant": self.batch_invariant,
            "part_bytes": self.part_bytes,
            **drawn,
            **(kept or {"accumulate": None, "format": self.format}),
        }


def check_options(moe: MoEHooks, layers: Any, stack: Any, accumulate: Any, **given: Any) -> CaptureOptions:
    """Options as they are used.

    Raises:
        ConfigError: options out of range, or that contradict each other.
        HookError: a layer that is none, or that has no such hook.
    """
    chosen = _layers(moe, layers, stack)
    tables = _tables(accumulate)
    flags = {name: bool(given[name]) for name in ("logits", "inputs", "norms", "predictions", "pad", "batch_invariant")}
    for table, field in NEEDED.items():
        flags[field] |= tables is not None and table in tables
    generate = check_whole(given["generate"] or 0, "generate", 0)
    if generate and stack_of(chosen[0]):
        raise ConfigError(
            f"generate={generate} with an encoder-decoder",
            "a decoder-only model",
            "Generate first (bridge.generate), and capture what it wrote as prompt and answer, with stack='decoder'.",
        )
    for name, low, high in (("temperature", 0.0, math.inf), ("top_p", 0.0, 1.0)):
        value = given[name]
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value == math.inf or (name == "top_p" and value == 0):
            expected = "a number above 0, of at most 1" if name == "top_p" else "a number of at least 0"
            raise ConfigError(f"{name}={value!r}", expected, f"Change {name}.")
    if flags["pad"] and (flags["batch_invariant"] or generate):
        other = "batch_invariant" if flags["batch_invariant"] else "generate"
        raise ConfigError(f"pad=True with {other}", "batches of one length, without padding", "Leave pad out.")
    if flags["batch_invariant"] and flags["norms"]:
        both = "batch_invariant=True with norms, for which experts run one slot after the other"
        raise ConfigError(both, "one of them", "Record norms by themselves, or with batch_size=1.")
    if given["format"] not in FORMATS:
        raise ConfigError(f"format={given['format']!r}", f"one of {', '.join(FORMATS)}", "Correct the format.")
    size = given["batch_size"]
    options = CaptureOptions(
        layers=chosen,
        **flags,
        generate=generate,
        temperature=float(given["temperature"]),
        top_p=float(given["top_p"]),
        seed=check_seed(given["seed"]),
        batch_size=None if size is None else check_whole(size, "batch_size", 1),
        tables=tables,
        all_tables=accumulate is True,
        part_bytes=check_whole(given["part_bytes"], "part_bytes", 1),
        format=given["format"],
    )
    _check_sizes(moe, options)
    return options


def _layers(moe: MoEHooks, layers: Any, stack: Any) -> tuple[Layer, ...]:
    """The layers to record: all attached ones, of an encoder-decoder those of one stack."""
    stacks = tuple(dict.fromkeys(stack_of(layer) for layer in moe.layers))
    if stack is not None and (stack not in stacks or not stack):
        expected = f"one of {', '.join(stacks)}" if stacks[0] else "no stack: the model has one"
        raise ConfigError(f"stack={stack!r}", expected, "Correct it, or leave it out.")
    if layers is None:
        wanted = stacks[0] if stack is None else stack
        return tuple(layer for layer in moe.layers if stack_of(layer) == wanted)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ConfigError(f"layers={layers!r}", f"layers among {list(moe.layers)}", "Give them as a list.")
    chosen = list(dict.fromkeys(moe.layer_label(layer) for layer in layers))
    if not chosen:
        raise ConfigError("layers without a layer: nothing to record", f"layers among {list(moe.layers)}", "Name some.")
    if len(of := {stack_of(layer) for layer in chosen} | ({stack} if stack else set())) > 1:
        raise ConfigError(
            f"layers of the {' and the '.join(sorted(of))}",
            "layers of one stack: the two read different tokens",
            "Capture each stack by itself.",
        )
    return tuple(sorted(chosen, key=moe.layers.index))


def _tables(accumulate: Any) -> tuple[str, ...] | None:
    if accumulate is None or accumulate is False:
        return None
    if accumulate is True:
        return ()
    if isinstance(accumulate, str) or not isinstance(accumulate, Sequence | set | frozenset):
        raise ConfigError(f"accumulate={accumulate!r}", "True, or names of tables", "Pass a list of names.")
    return tuple(sorted(str(name) for name in accumulate))


def _check_sizes(moe: MoEHooks, options: CaptureOptions) -> None:
    """Refuse layers that one array cannot hold, and hooks that a layer does not have."""
    specs = [moe.spec(layer) for layer in options.layers]
    for name in ("n_experts", "d_model"):
        sizes = {getattr(spec, name) for spec in specs}
        if len(sizes) > 1:
            given = f"layers of {name} {sorted(sizes)}"
            raise ConfigError(given, "layers of one size", "Capture those of each size by themselves: layers=.")
    for field in options.fields:
        for layer in options.layers:
            try:
                moe.hook_name(HOOKS[field], layer)
            except HookError as error:
                given = f"{field} of a model without its hook: {error.given}"
                raise HookError(given, error.expected, "Leave that field out.") from None
