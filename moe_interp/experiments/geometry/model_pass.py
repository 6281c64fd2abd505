"""Recording what the routers read, and where they send it, from a model on sequences."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_interp.arch.offload import device_of
from moe_interp.arch.rules import HashTable
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import Memory, tokens_per_pass
from moe_interp.engine.rerun import PrefixRunner, TargetPredictions
from moe_interp.errors import ConfigError, DataError, warn
from moe_interp.experiments.geometry.states import RoutedStates, has_expert, own_tokens, tokens_to_keep
from moe_interp.experiments.identity.model import model_identity
from moe_interp.experiments.identity.naming import model_name
from moe_interp.experiments.inputs.batches import batches_of_run
from moe_interp.experiments.inputs.repeats import distinct_sequences
from moe_interp.experiments.inputs.sequences import ScoredSequence, SequenceBatch, read_sequences
from moe_interp.experiments.router_tuning.routers import TunedRouter, router_inputs
from moe_interp.hooks.attach import MoEHooks
from moe_interp.progress import Report, reporting
from moe_interp.results import checksum
from moe_interp.results.cells import Arrays, CellStore
from moe_interp.routes.inputs import decoder_layers
from moe_interp.traces import RoutingTrace

CELLS_VERSION = 1


class SkippedLayerWarning(UserWarning):
    """Layers whose choice is no linear map of a state, which geometry leaves out."""


def linear_routers(moe: MoEHooks, layers: Any = None) -> list[TunedRouter]:
    """The linear maps of the routers. Of all layers, those that choose by token id are left out with a warning.

    Raises:
        ConfigError: a layer that was named chooses by token id; no layer is linear; a router without one plain weight;
            or layers of different numbers of experts or widths.
    """
    chosen = decoder_layers(moe, layers)
    hashed = [layer for layer in chosen if isinstance(moe.spec(layer).rule, HashTable)]
    if hashed and layers is None and len(hashed) < len(chosen):
        named = ", ".join(map(str, hashed))
        warn(
            f"layers {named} choose experts by token id, not by a state: geometry leaves them out", SkippedLayerWarning
        )
        chosen = tuple(layer for layer in chosen if layer not in hashed)
    routers = [TunedRouter.of(moe, layer) for layer in chosen]
    shapes = {tuple(router.parameter.shape) for router in routers}
    if len(shapes) > 1:
        given = f"routers with weights of shapes {sorted(shapes)}"
        raise ConfigError(given, "one number of experts and one width", "Measure layers of one kind at a time.")
    return routers


def router_weights(moe: MoEHooks, layers: Any = None) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """The weights ``[expert, d_in]`` of the routers' linear maps by layer, and their biases ``[expert]`` where any.

    They are what a trace with router inputs needs as well: see :func:`moe_interp.geometry.measure`.
    """
    routers = linear_routers(moe, layers)
    weights = {r.layer: r.start().double().cpu().numpy() for r in routers}
    return weights, {r.layer: r.bias.double().cpu().numpy() for r in routers if r.bias is not None}


@in_eval_mode
def record_states(
    moe: MoEHooks,
    sequences: Sequence[Any],
    layers: Any = None,
    max_tokens: int = 1024,
    memory_budget: int | None = None,
    store: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | Report | None = None,
) -> RoutedStates:
    """Run the model on sequences and keep all routes, every sequence's mean router input, and some tokens' inputs."""
    routers = linear_routers(moe, layers)
    read, _ = distinct_sequences(read_sequences(moe.bridge, sequences))
    lengths = [len(sequence) for sequence in read]
    names = tuple(sequence.id for sequence in read)
    plain = RoutingTrace.from_arrays(  # which tokens are kept does not depend on their routes
        np.zeros((sum(lengths), 1, 1), dtype=np.int32),
        sequence_lengths=lengths,
        n_experts=1,
        token_ids=np.concatenate([sequence.tokens for sequence in read]),
    )
    own = own_tokens(plain, names)
    keep = tokens_to_keep(plain, own, max_tokens, seed)

    def fitting() -> int:
        return tokens_per_pass(moe, max(lengths), memory_budget, kept_layers=len(routers), kept_tokens=sum(lengths))

    batches = batches_of_run(read, fitting, memory_budget, store, names=names)
    cells = None if store is None else CellStore(store, _plan(moe, read, routers, batches, max_tokens, seed))
    run = _Run(moe, routers, read, plain, own, keep)
    memory = Memory(moe, memory_budget)
    found: dict[int, Arrays] = {}
    with reporting("recording router inputs", progress) as report, torch.no_grad():
        report(0, len(batches))
        for number, index in enumerate(batches):
            cell = None if cells is None else cells.load(number)
            if cell is None:
                parts = memory.in_parts(partial(run.part, index), len(index), "sequences")
                cell = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                memory.say()
                if cells is not None:
                    cells.save(cell, number)
            found[number] = cell
            report(number + 1, len(batches))
    return run.joined(batches, found, _domains(sequences, names))


def _plan(
    moe: MoEHooks,
    read: Sequence[ScoredSequence],
    routers: Sequence[TunedRouter],
    batches: list[list[int]],
    max_tokens: int,
    seed: int,
) -> dict[str, Any]:
    content = checksum([[s.id, s.tokens] for s in read])
    return {
        "model": model_name(moe),
        "sequences": {"count": len(read), "checksum": content},
        "layers": [router.layer for router in routers],
        "max_tokens": max_tokens,
        "seed": seed,
        "version": CELLS_VERSION,
        **model_identity(moe),
        "batches": batches,
    }


class _Run:
    """One recording, batch by batch."""

    def __init__(
        self,
        moe: MoEHooks,
        routers: list[TunedRouter],
        sequences: list[ScoredSequence],
        plain: RoutingTrace,
        own: np.ndarray,
        keep: np.ndarray,
    ) -> None:
        self.moe, self.routers, self.sequences, self.own, self.keep = moe, routers, sequences, own, keep
        self.plain, self.runner = plain, PrefixRunner(moe)
        self.starts = np.cumsum(plain.sequence_lengths) - plain.sequence_lengths
        self.is_kept = np.isin(np.arange(plain.n_tokens), keep)

    def cell(self, index: list[int]) -> Arrays:
        """Routes and weights of a batch's tokens, sums of their inputs, and the inputs that are kept."""
        rows = [self.sequences[i] for i in index]
        device = device_of(self.moe.bridge.original_model)
        batch = SequenceBatch.build(rows, device)
        width = batch.tokens.shape[1]
        own, kept = (self._padded(flags, index, width).to(device) for flags in (self.own, self.is_kept))
        taken: dict[str, dict[int, Tensor]] = {"expert_indices": {}, "expert_weights": {}, "router_logits": {}}
        hooks = [
            (self.moe.hook_name(name, router.layer), _keeper(into, router.layer))
            for router in self.routers
            for name, into in taken.items()
        ]
        first = torch.zeros(1, dtype=torch.int64, device=device)
        with router_inputs(self.routers) as inputs:
            self.runner.base(batch.tokens, TargetPredictions(first, first, first), [], hooks)
        real = batch.mask.bool()
        layers = [router.layer for router in self.routers]
        # as seen by the linear maps: shape (row * pos, d) -> (row, pos, d)
        seen = {layer: inputs[layer].reshape(len(rows), width, -1) for layer in layers}
        exact = torch.float64 if seen[layers[0]].dtype == torch.float64 else torch.float32
        off = torch.stack(
            [self._deviation(router, seen[router.layer], taken["router_logits"]) for router in self.routers]
        )
        sums = torch.stack([(seen[layer].to(exact) * own.unsqueeze(-1)).sum(1) for layer in layers], dim=1)
        states = torch.stack([seen[layer][kept] for layer in layers], dim=1)
        slots = max(taken["expert_indices"][layer].shape[-1] for layer in layers)
        wide = torch.nn.functional.pad
        indices = [taken["expert_indices"][layer][real] for layer in layers]
        weights = [taken["expert_weights"][layer][real] for layer in layers]
        routes = torch.stack([wide(i, (0, slots - i.shape[-1]), value=-1) for i in indices], dim=1)
        applied = torch.stack([wide(w, (0, slots - w.shape[-1])) for w in weights], dim=1)
        self._check_linear(off.cpu().numpy(), states.dtype)
        return {
            "routes": routes.to(torch.int32).cpu().numpy(),
            "weights": applied.float().cpu().numpy(),
            "sums": sums.cpu().numpy(),
            "states": states.to(exact).cpu().numpy(),
        }

    def part(self, index: list[int], part: slice) -> Arrays:
        """The cell of a part of a batch."""
        return self.cell(index[part])

    def _padded(self, flags: np.ndarray, index: list[int], width: int) -> Tensor:
        rows = np.zeros((len(index), width), dtype=bool)
        for row, i in enumerate(index):
            n = len(self.sequences[i])
            rows[row, :n] = flags[self.starts[i] : self.starts[i] + n]
        return torch.from_numpy(rows)

    def _deviation(self, router: TunedRouter, seen: Tensor, logits: Mapping[int, Tensor]) -> Tensor:
        """How far the router's logits are from its weight times its input, relative to the largest, on the device."""
        found = router.logits(seen, router.start())
        recorded = logits[router.layer].to(found)
        return (found - recorded).abs().max() / (1 + recorded.abs().max())

    def _check_linear(self, off: np.ndarray, dtype: torch.dtype) -> None:
        """Refuse a router whose logits are no linear map of what it reads."""
        most = {torch.float64: 1e-5, torch.float32: 1e-4}.get(dtype, 0.05)  # some routers cast to float32
        if not (off <= most).all():
            router = self.routers[int(np.argmax(np.where(np.isnan(off), np.inf, off)))]
            raise ConfigError(
                f"the router of layer {router.layer}, whose logits are not its weight times its input",
                "a linear router",
                "Choose other layers, or merge adapters into its weights.",
            )

    def joined(self, batches: list[list[int]], cells: Mapping[int, Arrays], domain: list[str] | None) -> RoutedStates:
        """All batches together, in the order of the sequences."""
        plain, n_layers = self.plain, len(self.routers)
        slots = max(cell["routes"].shape[2] for cell in cells.values())
        routes = np.full((plain.n_tokens, n_layers, slots), -1, dtype=np.int32)
        weights = np.zeros(routes.shape, dtype=np.float32)
        example = cells[0]["states"]
        states = np.empty((len(self.keep), *example.shape[1:]), dtype=example.dtype)
        sums = np.empty((len(self.sequences), *example.shape[1:]))
        for number, index in enumerate(batches):
            cell = cells[number]
            tokens = np.concatenate([self.starts[i] + np.arange(len(self.sequences[i])) for i in index])
            width = cell["routes"].shape[2]
            routes[tokens, :, :width], weights[tokens, :, :width] = cell["routes"], cell["weights"]
            states[np.searchsorted(self.keep, tokens[self.is_kept[tokens]])] = cell["states"]
            sums[index] = cell["sums"]
        trace = RoutingTrace.from_arrays(
            routes,
            weights,
            sequence_lengths=plain.sequence_lengths,
            n_experts=self.moe.spec(self.routers[0].layer).n_experts,
            layers=[router.layer for router in self.routers],
            domain=domain,
            token_ids=plain.token_ids,
        )
        served = has_expert(routes)
        own = self.own & served
        for name, number in zip(
            (s.id for s in self.sequences),
            np.bincount(
                plain.sequence[own & np.isin(np.arange(plain.n_tokens), self.keep)], minlength=len(self.sequences)
            ),
        ):
            if not number:
                given = f"sequence {name!r} without a kept token that has an expert at every layer"
                raise DataError(given, "an expert at every layer", "Raise max_tokens, or leave it out.")
        states = states[served[self.keep]]
        if not np.isfinite(states).all():
            raise DataError("router inputs that are not finite", "finite numbers", "Run in bfloat16 or float32.")
        return RoutedStates(
            trace=trace,
            is_own=own,
            names=tuple(s.id for s in self.sequences),
            pooled=sums / np.bincount(plain.sequence[self.own])[:, None, None],
            kept=self.keep[served[self.keep]],
            states=states,
            weights=np.stack([r.start().double().cpu().numpy() for r in self.routers]),
            bias=np.stack([_bias(r) for r in self.routers]),
            model=model_name(self.moe),
        )


def _bias(router: TunedRouter) -> np.ndarray:
    bias = router.bias
    return np.zeros(router.parameter.shape[0]) if bias is None else bias.double().cpu().numpy()


def _keeper(into: dict[int, Tensor], layer: int) -> Callable[[Tensor, Any], None]:
    def keep(value: Tensor, hook: Any) -> None:
        into[layer] = value.detach()

    return keep


def _domains(sequences: Sequence[Any], names: tuple[str, ...]) -> list[str] | None:
    """The domain of each sequence that was read, where all have one."""
    known: dict[str, str] = {}
    for number, entry in enumerate(sequences):
        fields = entry if isinstance(entry, Mapping) else getattr(entry, "fields", None) or {}
        domain = getattr(entry, "domain", None) or fields.get("domain")
        name = fields.get("id") if isinstance(entry, Mapping) else getattr(entry, "id", None)
        known[str(number if name is None else name)] = str(domain) if domain else ""
    found = [known.get(name, "") for name in names]
    return found if all(found) else None
