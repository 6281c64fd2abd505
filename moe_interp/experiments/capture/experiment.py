"""``capture_routing``: the routes and weights that an attached model takes, as a trace, in files, or as counts."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.engine.pass_inputs import check_memory
from moe_interp.experiments.capture.folder import CaptureFolder
from moe_interp.experiments.capture.options import PART_BYTES, CaptureOptions, check_options
from moe_interp.experiments.capture.passes import Recorded, RoutingPasses
from moe_interp.experiments.capture.recorded import RecordedRouting
from moe_interp.experiments.capture.recorder import widened
from moe_interp.experiments.capture.sequences import CapturedSequence, SequenceReader
from moe_interp.experiments.capture.sinks import CountsOnly, PartsOnDisk, Sink, TraceInMemory
from moe_interp.experiments.identity.model import model_identity
from moe_interp.experiments.identity.naming import model_name
from moe_interp.experiments.pass_at_k.sampling_run import end_tokens
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.progress import Report, reporting
from moe_interp.traces import RoutingCounts, RoutingTrace
from moe_interp.types import Hooks, Layer


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def capture_routing(
    moe: MoEHooks,
    sequences: Any,
    out: str | os.PathLike[str] | None = None,
    accumulate: bool | Collection[str] | None = None,
    *,
    layers: Sequence[Layer] | None = None,
    stack: Literal["encoder", "decoder"] | None = None,
    logits: bool = False,
    inputs: bool = False,
    norms: bool = False,
    predictions: bool = True,
    generate: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    hooks: Hooks | None = None,
    attention_mask: Tensor | None = None,
    domain: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    pad: bool = False,
    batch_invariant: bool = False,
    part_bytes: int = PART_BYTES,
    format: Literal["parquet", "npz"] = "parquet",
    memory_budget: int | None = None,
    resume: bool = True,
    progress: bool | Report | None = None,
) -> RoutingTrace | RecordedRouting | RoutingCounts:
    """Run a model on sequences and record which experts each token uses at each layer, and with which weights.

    What is recorded equals what ``run_with_cache`` gives at the hooks ``expert_indices``, ``expert_weights``,
    ``router_logits`` and ``router_in``, bit for bit, for the batches that are run. A batch holds sequences of one
    length, without padding; a tensor of ids is run as the batch that it is, if memory allows. A model's own numbers
    depend on the batch by rounding, and so do those recorded in other batches: ``batch_size=1`` gives those of every
    sequence run alone, ``batch_invariant=True`` the same bits for every batch size. Padding is never recorded.

    Args:
        moe: Attached hooks.
        sequences: Texts, lists of ids, mappings (of ``text``, ``tokens``, ``messages``, or ``prompt`` and perhaps
            ``answer``; ``id`` and ``domain`` if they have them), or what ``load_items`` and ``load_sequences`` give;
            such lists by domain, ``{domain: [...]}``; token ids ``[batch, pos]``; or an iterator, which is read
            as the run goes on.
        out: A folder for parts of whole sequences, written one by one. The same call goes on from it.
        accumulate: Keep counts only, of corpora of any size. True for all tables, or names of tables, see
            :class:`moe_interp.traces.RoutingCounts`; "norms" and "margin" record what they need.
        layers: MoE layers; all attached ones by default.
        stack: Of an encoder-decoder, whose two stacks read different tokens: the one to record, "encoder" by default.
            The encoder reads a text or a prompt, the decoder its start token and the answer.
        logits, inputs, norms: Record the router's logits, its inputs, and the L2 norms of the used experts' outputs
            before their weights are applied (of the scaled input's output where a family weights the input).
        predictions: Record the likeliest next id at every token.
        generate: Generate so many tokens after each sequence, up to an end-of-sequence token, and record them too: each
            generated token is an input of the model, the last one included. Of prompt and answer, the prompt is read.
            Not for encoder-decoders, nor with ``pad``.
        temperature, top_p, seed: How tokens are drawn; temperature 0 is greedy. Draws depend on ``seed`` and the
            sequence's id alone.
        hooks: Interventions, in place during all passes; what is recorded are the routes under them.
        attention_mask: ``[batch, pos]`` of token ids; rows are run with their padding, on the left or on the right.
        domain: One label for all, or one a sequence, in place of those that sequences bring, which are the default.
        batch_size: Sequences of a pass at most; by default what fits into memory.
        pad: Run sequences of like length together, padded on the right. Fewer passes; numbers differ from those of each
            sequence alone by rounding, and where experts have a capacity, padding uses it up.
        batch_invariant: Run products in an order that does not depend on the batch, see
            :func:`moe_interp.batch_invariant`: float32 on a processor, without ``pad`` and ``norms``.
        part_bytes: Size of a part in memory, in bytes. A longer sequence is a part of its own.
        format: Format of the parts: "parquet" (needs pyarrow) or "npz".
        memory_budget: Bytes that a pass may use; by default what is free. What does not fit is run in halves.
        resume: False replaces what ``out`` holds.
        progress: See :func:`moe_interp.progress.reporting`.

    Returns:
        A :class:`moe_interp.RoutingTrace`; with ``out`` the folder as a :class:`RecordedRouting`, whose ``read()`` is
        the trace; with ``accumulate`` a :class:`moe_interp.traces.RoutingCounts`, which equals that of the trace.
        ``phase`` of a token is "prefill" where it was given, "generation" where it was generated.

    Raises:
        ConfigError: options out of range or that contradict each other, no layer to record, or too small a budget.
        DataError: no sequence, one that cannot be read or is longer than the context, domains of some only, or logits
            that are not finite.
        HookError: a layer that is none, or a field whose hook the model does not have.
        ResultError: a folder of something else or of another capture, or that cannot be written to.

    What it does not show: why a token is routed so, or what its experts compute. Numbers are stored in float32: those
    of a float64 model are rounded, and replaying them is not exact.
    """
    check_attached(moe)
    options = check_options(
        moe, layers, stack, accumulate, logits=logits, inputs=inputs, norms=norms, predictions=predictions,
        generate=generate, temperature=temperature, top_p=top_p, seed=seed, pad=pad, batch_size=batch_size,
        batch_invariant=batch_invariant, part_bytes=part_bytes, format=format,
    )  # fmt: skip
    memory, given = check_memory(moe, memory_budget), list(hooks or [])
    reader = SequenceReader(
        moe, sequences, attention_mask, domain, options.generate, bool(options.generate), bool(options.stack)
    )
    passes = RoutingPasses(moe, options, given, memory)
    sink = _sink(moe, options, given, passes, out, resume)
    finished = _run(passes, reader, sink, moe.spec(options.layers[0]).n_experts, progress)
    return RecordedRouting(finished) if isinstance(sink, PartsOnDisk) else finished


def _sink(moe: MoEHooks, options: CaptureOptions, hooks: Hooks, passes: RoutingPasses, out: Any, resume: bool) -> Sink:
    """What takes the parts."""
    folder = None
    if out is not None:
        with moe.bridge.hooks(fwd_hooks=hooks):
            identity = model_identity(moe)
        plan = options.plan() | ({"end_tokens": sorted(end_tokens(moe))} if options.generate else {}) | identity
        folder = CaptureFolder(out, plan, _about(moe, options, passes), resume)
    if options.tables is not None:
        return CountsOnly(options, moe.spec(options.layers[0]).n_experts, folder)
    return TraceInMemory() if folder is None else PartsOnDisk(folder, options.format)


def _about(moe: MoEHooks, options: CaptureOptions, passes: RoutingPasses) -> dict[str, Any]:
    """What the manifest says of the model and of what is recorded."""
    spec = moe.spec(options.layers[0])
    recorded = [name.replace("_", " ") for name in passes.recorder.fields]
    recorded += ["predicted ids"] if options.predictions and options.stack != "encoder" else []
    return {
        "model": model_name(moe),
        "family": spec.family.name,
        "stack": options.stack,
        "layers": list(options.numbers),
        "n_experts": spec.n_experts,
        "top_k": spec.top_k,
        "recorded": recorded,
    }


def _run(passes: RoutingPasses, reader: SequenceReader, sink: Sink, n_experts: int, progress: Any) -> Any:
    """Record what is not there yet, part by part."""
    n_parts = done = 0
    with reporting("capturing routing", progress) as report, passes.running():

        def count(n: int) -> None:
            nonlocal done
            done += n
            report(done, reader.total or 0)

        count(0)
        try:
            for number, part in enumerate(_parts(reader, passes)):
                n_parts = number + 1
                if sink.has(number, part):
                    count(len(part))
                    continue
                sink.add(number, part, _trace(passes.options, n_experts, part, passes.record(part, count)))
        finally:
            sink.flush()
    return sink.finish(n_parts)


def _parts(sequences: Iterable[CapturedSequence], passes: RoutingPasses) -> Iterator[list[CapturedSequence]]:
    """Whole sequences, in their order, of so many bytes; what a part holds depends on the options alone."""
    options, part, kept = passes.options, list[CapturedSequence](), 0
    a_token = options.token_bytes(passes.moe)
    for sequence in sequences:
        size = a_token * (len(sequence) + len(sequence.answer) + options.generate)
        if part and kept + size > options.part_bytes:
            yield part
            part, kept = [], 0
        part.append(sequence)
        kept += size
    if part:
        yield part


def _trace(
    options: CaptureOptions, n_experts: int, sequences: Sequence[CapturedSequence], found: list[Recorded]
) -> RoutingTrace:
    """The trace of some sequences."""
    joined = [one.joined() for one in found]
    arrays: dict[str, Any] = {}
    for name in joined[0]:
        values = torch.cat(widened(name, [each[name] for each in joined]))
        arrays[name] = (values.float() if values.is_floating_point() else values).numpy()
    phase = [["prefill"] * one.n_prefill + ["generation"] * (len(one.token_ids) - one.n_prefill) for one in found]
    labels = [one.domain for one in sequences]
    return RoutingTrace.from_arrays(
        arrays.pop("expert_indices"),
        sequence_lengths=[len(one.token_ids) for one in found],
        n_experts=n_experts,
        layers=options.numbers,
        token_ids=np.concatenate([one.token_ids for one in found]),
        domain=None if labels[0] is None else np.array(labels, dtype=object),
        phase=np.concatenate(phase),
        **arrays,
    )
