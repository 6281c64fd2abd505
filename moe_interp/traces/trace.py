"""Recorded routing: which experts each token used at each layer, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.errors import DataError
from moe_interp.slots import EMPTY, NATIVE
from moe_interp.traces.checks import (
    as_array,
    checked_count,
    checked_domain,
    checked_ids,
    checked_indices,
    checked_layers,
    checked_lengths,
    checked_norms,
    checked_phase,
    checked_vectors,
    checked_weights,
    refuse_bad_experts,
    uncovered,
)
from moe_interp.traces.files import BY_SLOT, OPTIONAL, halved, write_trace_file
from moe_interp.traces.part_files import is_recorded, part_files, reading_a_part
from moe_interp.traces.readers.columns import Layers
from moe_interp.traces.readers.engine_rows import Uncaptured
from moe_interp.traces.readers.formats import read_arguments
from moe_interp.traces.readers.router_logits import Rule, router_logit_arguments
from moe_interp.traces.readers.sglang import sglang_arguments
from moe_interp.traces.readers.vllm import vllm_arguments


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routes of a set of sequences, one row per real token (padding is not recorded).

    Made by :meth:`from_arrays` or :meth:`read`, which check it. A slot with index -1 is empty: it has weight 0 and is
    skipped by every measure. A row ``[token, layer]`` with -2 in all slots is not covered: nothing is known of the
    token's route there. No measure counts such a token at that layer, and :func:`~moe_interp.replay_routes` leaves it
    to the model's own router.

    Attributes:
        expert_indices: ``[token, layer, slot]`` int32; slots in the router's own order.
        expert_weights: ``[token, layer, slot]`` float32, the weights as applied; None where not recorded.
        sequence: ``[token]`` int64, index of the token's sequence, non-decreasing.
        n_experts: Experts per layer, shared experts not counted.
        layers: The model's index of each layer of the trace.
        token_ids: ``[token]`` int64 ids of the input tokens; None where not recorded.
        predicted_ids: ``[token]`` int64 ids that the model predicts at each token; None where not recorded.
        domain: ``[token]`` labels; None where there are none.
        phase: ``[token]`` "prefill" or "generation", in which the token was the model's input; None where not recorded.
        router_logits: ``[token, layer, expert]`` float32, as the router's linear map gives them, NaN where the row is
            not covered; None where not recorded.
        router_inputs: ``[token, layer, d_model]`` float32, likewise.
        expert_norms: ``[token, layer, slot]`` float32, the L2 norm of each used expert's output before its weight is
            applied, 0 in empty slots; None where not recorded.

    What it does not show: what the experts compute. Two tokens on one route may be treated differently.
    """

    expert_indices: NDArray[np.int32]
    expert_weights: NDArray[np.float32] | None
    sequence: NDArray[np.int64]
    n_experts: int
    layers: tuple[int, ...]
    token_ids: NDArray[np.int64] | None = None
    predicted_ids: NDArray[np.int64] | None = None
    domain: NDArray[np.str_] | None = None
    phase: NDArray[np.str_] | None = None
    router_logits: NDArray[np.float32] | None = None
    router_inputs: NDArray[np.float32] | None = None
    expert_norms: NDArray[np.float32] | None = None

    @classmethod
    def from_arrays(
        cls,
        expert_indices: ArrayLike,
        expert_weights: ArrayLike | None = None,
        sequence_lengths: ArrayLike | None = None,
        n_experts: int | None = None,
        layers: Sequence[int] | None = None,
        domain: ArrayLike | None = None,
        token_ids: ArrayLike | None = None,
        predicted_ids: ArrayLike | None = None,
        phase: ArrayLike | None = None,
        router_logits: ArrayLike | None = None,
        router_inputs: ArrayLike | None = None,
        expert_norms: ArrayLike | None = None,
        covered: ArrayLike | None = None,
    ) -> RoutingTrace:
        """A checked trace from arrays or tensors; the sequences lie one after the other along the token axis.

        Args:
            expert_indices: ``[token, layer, slot]`` integers from -1 (empty slot) to ``n_experts - 1``, no expert twice
                for one token and layer; or -2 in all slots of a token that the trace does not cover at a layer.
            expert_weights: ``[token, layer, slot]`` finite numbers; those of empty slots are stored as 0.
            sequence_lengths: ``[sequence]`` tokens of each sequence. Without it, all tokens are one sequence.
            n_experts: Experts per layer; required, since unused experts leave no mark in the indices.
            layers: The model's index of each layer; 0, 1, ... without it.
            domain: One label for all, or one per sequence, or one per token.
            token_ids: ``[token]`` input ids.
            predicted_ids: ``[token]`` predicted ids.
            phase: "prefill" or "generation", one for all or one per token.
            router_logits: ``[token, layer, expert]`` finite numbers; those of rows not covered are stored as NaN.
            router_inputs: ``[token, layer, d_model]``, likewise.
            expert_norms: ``[token, layer, slot]`` norms; those of empty slots are stored as 0.
            covered: Boolean mask ``[token]`` or ``[token, layer]``; where it is False, the routes become -2.

        Raises:
            DataError: Wrong shapes or types, an expert out of range or used twice; names token, layer and expert.
        """
        indices = checked_indices(expert_indices)
        indices = indices if covered is None else uncovered(indices, covered)
        n_tokens, n_layers, _ = indices.shape
        n_experts = checked_count(n_experts, indices)
        layers = checked_layers(layers, n_layers)
        refuse_bad_experts(indices, n_experts, layers)
        lengths = checked_lengths(sequence_lengths, n_tokens)
        return cls(
            expert_indices=indices,
            expert_weights=None if expert_weights is None else checked_weights(expert_weights, indices, layers),
            sequence=np.repeat(np.arange(len(lengths)), lengths),
            n_experts=n_experts,
            layers=layers,
            token_ids=checked_ids("token_ids", token_ids, n_tokens),
            predicted_ids=checked_ids("predicted_ids", predicted_ids, n_tokens),
            domain=checked_domain(domain, lengths),
            phase=checked_phase(phase, n_tokens),
            router_logits=None
            if router_logits is None
            else checked_vectors("router_logits", router_logits, indices, layers, n_experts),
            router_inputs=None
            if router_inputs is None
            else checked_vectors("router_inputs", router_inputs, indices, layers),
            expert_norms=None if expert_norms is None else checked_norms(expert_norms, indices, layers),
        )

    @classmethod
    def concatenate(cls, traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """One trace with the sequences of all, in order. Narrow traces are filled up with empty slots.

        A field that some of the traces lack is left out.

        Raises:
            DataError: No trace, or traces of different layers or numbers of experts.
        """
        if not traces or any((t.layers, t.n_experts) != (traces[0].layers, traces[0].n_experts) for t in traces):
            raise DataError(
                f"Traces of layers and experts {sorted({(t.layers, t.n_experts) for t in traces})}",
                "at least one trace, all with the same layers and number of experts",
                "Concatenate traces of one model only.",
            )
        width = max(t.expert_indices.shape[2] for t in traces)

        def widened(values: NDArray[Any], fill: int) -> NDArray[Any]:
            return np.pad(values, ((0, 0), (0, 0), (0, width - values.shape[2])), constant_values=fill)

        def widened_routes(trace: RoutingTrace) -> NDArray[np.int32]:
            indices = widened(trace.expert_indices, EMPTY)
            indices[~trace.covered] = NATIVE
            return indices

        def joined(name: str) -> NDArray[Any] | None:
            parts = [getattr(t, name) for t in traces]
            if any(part is None for part in parts):
                return None
            if name in BY_SLOT:
                parts = [widened(part, 0) for part in parts]
            if len({part.shape[1:] for part in parts}) > 1:
                raise DataError(
                    f"{name} of widths {sorted({part.shape[-1] for part in parts})}",
                    "vectors of one width",
                    "Concatenate traces of one model only.",
                )
            return np.concatenate(parts)

        return cls.from_arrays(
            np.concatenate([widened_routes(t) for t in traces]),
            sequence_lengths=np.concatenate([t.sequence_lengths for t in traces]),
            n_experts=traces[0].n_experts,
            layers=traces[0].layers,
            **{name: joined(name) for name in OPTIONAL},
        )

    @classmethod
    def from_vllm(
        cls,
        outputs: Any,
        n_experts: int | None = None,
        layers: Layers = None,
        *,
        moe: Any = None,
        sentinel: int | None = None,
        uncaptured: Uncaptured = "refuse",
    ) -> RoutingTrace:
        """The trace of what vLLM returned with ``enable_return_routed_experts=True``: a sequence for each completion,
        its prompt included; no weights.

        Args:
            outputs: What ``LLM.generate`` returned, responses of the server as JSON objects, or arrays ``[row, column,
                slot]``, one a sequence.
            n_experts, layers, moe, sentinel, uncaptured: See :meth:`read`, also for the errors.
        """
        return cls.from_arrays(**vllm_arguments(outputs, n_experts, layers, moe, sentinel, uncaptured))

    @classmethod
    def from_sglang(
        cls,
        responses: Any,
        n_experts: int | None = None,
        layers: Layers = None,
        *,
        moe: Any = None,
        top_k: int | None = None,
        n_columns: int | None = None,
        sentinel: int | None = None,
        uncaptured: Uncaptured = "refuse",
    ) -> RoutingTrace:
        """The trace of what SGLang returned with ``return_routed_experts``; as :meth:`from_vllm`.

        Args:
            responses: JSON objects of the server, base64 texts of ``meta_info["routed_experts"]``, or arrays ``[row,
                column, slot]``; one a sequence.
            top_k, n_columns: Slots and columns, which the texts do not tell; by default of ``moe`` or ``layers``.
            n_experts, layers, moe, sentinel, uncaptured: See :meth:`read`, also for the errors.
        """
        arguments = sglang_arguments(responses, n_experts, layers, moe, top_k, n_columns, sentinel, uncaptured)
        return cls.from_arrays(**arguments)

    @classmethod
    def from_router_logits(
        cls,
        router_logits: Sequence[Any],
        n_experts: int | None = None,
        layers: Layers = None,
        *,
        moe: Any = None,
        rule: Rule | None = None,
        top_k: int | None = None,
        attention_mask: Any = None,
        **labels: Any,
    ) -> RoutingTrace:
        """The trace that follows from transformers' ``output.router_logits`` (``output_router_logits=True``).

        Logits do not tell which experts ran. Correction biases, groups of experts and scales are the family's own, and
        the largest logits are the wrong experts where it has any: pass the attached model, whose rule is applied.

        Args:
            router_logits: One tensor a MoE layer, ``[batch * pos, expert]`` or ``[batch, pos, expert]``, or None.
            n_experts, layers, moe: See :meth:`read`.
            rule: Without a model: "softmax" (weights are shares of a softmax over all experts), "topk_softmax" (over
                the ``top_k`` chosen ones, or normalised), or a function from the logits to indices and weights.
            top_k: Experts a token, for a named rule.
            attention_mask: ``[batch, pos]``, 1 at real tokens; without it and from flat logits, one sequence.
            **labels: ``token_ids, predicted_ids, domain, phase``: as :meth:`from_arrays`.

        Raises:
            ConfigError: neither a model nor a rule.
            DataError: probabilities instead of logits, another number of layers than the model has MoE layers, or
                logits that the rule does not start from (after a soft-cap).
        """
        arguments = router_logit_arguments(router_logits, n_experts, layers, moe, rule, top_k, attention_mask)
        return cls.from_arrays(**arguments, **labels)

    @classmethod
    def read(
        cls,
        path: str | Path,
        format: str | None = None,
        n_experts: int | None = None,
        layers: Layers = None,
        **options: Any,
    ) -> RoutingTrace:
        """The trace of a file, of this package or of another tool.

        Args:
            path: The file; the folder of ESFT's or Megatron's logs; or one that ``capture_routing(out=...)`` wrote.
            format: "npz", "parquet" (what :meth:`save` wrote; by the suffix), "esft", "vllm", "sglang", "megatron" or
                "transformers"; the modules of :mod:`moe_interp.traces.readers` describe what these write.
            n_experts: Experts per layer; needed unless the file or ``moe`` tells.
            layers: The model's index of each column. Engines do not record it, so it must be said: a list; "all", a
                column for every layer of the model, empty where it is dense; or "moe", the MoE layers in order. With
                "moe" and no ``moe`` they are counted from 0, and ``replay_routes(..., layers="moe")`` puts them in
                their places. Where a file numbers its layers: those to read.
            **options: ``moe``: attached hooks, which tell experts and layers. ``token_ids, predicted_ids, domain``: as
                :meth:`from_arrays`. "vllm", "sglang": ``sequence_lengths`` (tokens of prompt and generation), ``start``
                (leading tokens without a row), ``sentinel`` (a fill value), ``uncaptured="native"`` (rows of zeros are
                not covered, rather than refused); "sglang": ``top_k, n_columns``. "esft": ``top_k, sequence_lengths,
                weights``. "megatron": ``batch_size, steps, side_files``. "transformers": as :meth:`from_router_logits`.

        A folder that ``capture_routing(out=...)`` wrote gives all its parts as one trace; one that does not fit into
        memory is read by :func:`moe_interp.traces.read_parts`.

        Raises:
            ResultError: No such file, of an unknown format, of another version, or damaged.
            DataError: The file's routes are not valid; names file and line, or token, layer and expert.
            ConfigError: An option that the format does not have.

        What it does not show: weights, token ids or logits that the tool did not write; docs/traces.md says which.
        """
        if format is None and is_recorded(path):
            with reading_a_part():
                parts = [cls.read(file, None, n_experts, layers, **options) for file in part_files(path)]
            return parts[0] if len(parts) == 1 else cls.concatenate(parts)
        try:
            return cls.from_arrays(**read_arguments(path, format, n_experts, layers, options))
        except DataError as error:
            given = error.given if str(path) in error.given else f"{path}: {error.given}"
            raise DataError(given, error.expected, error.remedy) from error

    def save(self, path: str | Path, format: str | None = None, half: bool = False) -> Path:
        """Write the trace to one file, which appears whole or not at all, and return its path.

        ``npz``: one array a field. ``parquet`` (needs pyarrow): one row per token and layer with ``sequence, position,
        layer``, the labels, ``expert_0, weight_0, norm_0, ...`` by slot, and lists of router logits and inputs.

        Args:
            path: The file.
            format: By the suffix where it is None.
            half: Store router logits and router inputs in float16, which keeps 3 digits and no number above 65504.

        Raises:
            ResultError: Unknown format, or the file cannot be written.
            DataError: A number that float16 cannot hold.
        """
        arrays = self.arrays()
        return write_trace_file(path, format, halved(arrays) if half else arrays)

    def arrays(self) -> dict[str, Any]:
        """The arguments of :meth:`from_arrays` that make this trace again."""
        names = ("expert_indices", "sequence_lengths", "n_experts", "layers", *OPTIONAL)
        return {name: getattr(self, name) for name in names}

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences together."""
        return len(self.expert_indices)

    @property
    def n_slots(self) -> int:
        """Width of the widest route."""
        return self.expert_indices.shape[2]

    @cached_property
    def covered(self) -> NDArray[np.bool_]:
        """``[token, layer]``: whether the token's route was recorded. -2 fills the others."""
        return self.expert_indices[..., 0] != NATIVE

    @cached_property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """``[sequence]`` tokens of each sequence."""
        return np.bincount(self.sequence)

    @cached_property
    def position(self) -> NDArray[np.int64]:
        """``[token]`` position of the token in its sequence, from 0."""
        starts = np.cumsum(self.sequence_lengths) - self.sequence_lengths
        return np.arange(self.n_tokens) - starts[self.sequence]

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """The labels in use, sorted; empty where the trace has none."""
        return () if self.domain is None else tuple(np.unique(self.domain).tolist())

    @cached_property
    def domain_codes(self) -> NDArray[np.int64]:
        """``[token]`` index of the token's label in :attr:`domains`.

        Raises:
            DataError: The trace has no labels.
        """
        if self.domain is None:
            raise DataError(
                "A trace without domain labels",
                "a label per sequence or token",
                "Pass domain=... to RoutingTrace.from_arrays, or set it with trace.with_domain(labels).",
            )
        return np.unique(self.domain, return_inverse=True)[1]

    def with_domain(self, domain: ArrayLike) -> RoutingTrace:
        """The same routes under other labels: one for all, one per sequence, or one per token."""
        return replace(self, domain=checked_domain(domain, self.sequence_lengths))

    def select(self, tokens: ArrayLike) -> RoutingTrace:
        """The trace of some tokens, in their order. Positions count the selected tokens only.

        Sequences of which no token is selected are left out.

        Args:
            tokens: ``[token]`` boolean mask.

        Raises:
            DataError: Not a boolean mask of this trace's tokens, or none selected.
        """
        mask = as_array(tokens)
        if mask.dtype != bool or mask.shape != (self.n_tokens,) or not mask.any():
            raise DataError(
                f"A selection of shape {mask.shape}, type {mask.dtype}, {int(np.count_nonzero(mask))} tokens",
                f"a boolean mask of shape ({self.n_tokens},) with at least one token",
                "Build it by comparing trace.domain, trace.sequence or trace.position with a value.",
            )
        fields = ("expert_indices", *OPTIONAL)
        kept: dict[str, Any] = {name: values[mask] for name in fields if (values := getattr(self, name)) is not None}
        return replace(self, **kept, sequence=np.unique(self.sequence[mask], return_inverse=True)[1])

    def counts(self, groups: ArrayLike | None = None, n_groups: int = 1) -> NDArray[np.int64]:
        """Slots per expert, ``[group, layer, expert]``; empty slots and tokens that are not covered are skipped.

        Args:
            groups: ``[token]`` group of each token in ``range(n_groups)``, such as :attr:`domain_codes`; one group
                without it.
            n_groups: Number of groups.
        """
        group = np.zeros(self.n_tokens, dtype=np.int64) if groups is None else as_array(groups)
        shape = (n_groups, len(self.layers), self.n_experts)
        counts = np.empty(shape, dtype=np.int64)
        for layer in range(len(self.layers)):  # by layer: the flat codes of a long trace would not fit
            experts = self.expert_indices[:, layer]
            codes = (group[:, None] * self.n_experts + experts)[experts >= 0]
            counts[:, layer] = np.bincount(codes, minlength=n_groups * self.n_experts).reshape(n_groups, self.n_experts)
        return counts

    def __repr__(self) -> str:
        domains = f", domains {', '.join(self.domains)}" if self.domains else ""
        shape = f"{self.n_tokens} tokens in {len(self.sequence_lengths)} sequences, {len(self.layers)} layers"
        bare = "" if self.covered.all() else f", {int((~self.covered).sum())} routes not covered"
        return f"RoutingTrace({shape}, {self.n_experts} experts, {self.n_slots} slots{domains}{bare})"
