"""``moe-interp capture``: record which experts every token uses."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_interp.cli import console, options
from moe_interp.cli.startup import INTERRUPTED, work_begins
from moe_interp.errors import ConfigError

FORMATS = ("parquet", "npz")
STACKS = ("encoder", "decoder")


def capture(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    sequences: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON-lines files of text, tokens, messages, or prompt (and answer); or 'demo', the bundled held-out "
            "items.",
            metavar="FILE",
        ),
    ] = None,
    prompt_field: options.PromptField = "prompt",
    answer_field: Annotated[
        str, typer.Option(help="The field that holds what follows the prompt.", metavar="NAME")
    ] = "answer",
    domain_field: options.DomainField = "domain",
    first: options.First = None,
    layers: options.Layers = None,
    stack: Annotated[str | None, typer.Option(help="Of an encoder-decoder: encoder or decoder.")] = None,
    generate: Annotated[
        int | None, typer.Option(help="Generate N tokens after each text or prompt, and record them too.", metavar="N")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of what is generated; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Mass of the nucleus that is sampled from; 1 is everything.")] = 1.0,
    logits: Annotated[bool, typer.Option("--logits", help="Record router logits.")] = False,
    inputs: Annotated[bool, typer.Option("--inputs", help="Record the routers' inputs, d_model numbers each.")] = False,
    norms: Annotated[bool, typer.Option("--norms", help="Record the norms of the used experts' outputs.")] = False,
    accumulate: Annotated[
        bool, typer.Option("--accumulate", help="Keep counts only, for corpora of any size.")
    ] = False,
    tables: Annotated[
        str | None, typer.Option(help="With --accumulate: the tables to count, e.g. sequences,co_activation.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of a pass; by default what fits.")] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Run sequences of like length together, padded: fewer passes.")
    ] = False,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same bits for every batch size (float32 on a CPU).")
    ] = False,
    format: Annotated[str, typer.Option(help=f"Of the parts: {' or '.join(FORMATS)}.")] = "parquet",
    part: Annotated[
        float, typer.Option(help="MiB of a part in --out: what an interruption costs at most.", metavar="MIB")
    ] = 64.0,
    memory: options.Memory = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    seed: options.Seed = 0,
    resume: Annotated[bool, typer.Option(help="Go on with the finished parts in --out.")] = True,
) -> None:
    """Run a model on sequences, and record which experts each token uses at each layer and with which weights.

    A line of --sequences is a text, a list of ids, or an object of text, tokens,
    messages, or prompt (and answer); and id and domain, if it has them. Writes
    parts of whole sequences, each when it is done: the same command goes on
    from them after an interruption.
    """
    options.check_number("--generate", generate)
    options.check_number("--batch-size", batch_size)
    options.check_number("--first", first)
    options.check_positive("--part", part, "MiB")
    if not temperature >= 0:
        raise ConfigError(f"--temperature {temperature}", "a number of at least 0", "0 is greedy.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p}", "a number above 0, of at most 1", "1 is all of the vocabulary.")
    options.check_one_of("--format", format, FORMATS, "a format")
    if stack is not None:
        options.check_one_of("--stack", stack, STACKS, "a stack")
    names_of_tables = options.names_of("--tables", tables, "sequences,co_activation")
    if names_of_tables is not None and not accumulate:
        raise ConfigError(f"--tables {tables} without --accumulate", "both", "Add --accumulate.")
    options.check_common(model, device, dtype, seed, out)
    options.check_device_map(device_map, device)
    budget, layer_names = options.memory_bytes(memory), options.layer_names(layers)
    files = options.inputs("--sequences", sequences, model, "text, tokens, messages, or prompt and answer")
    names = options.field_names(files, prompt_field=prompt_field, answer_field=answer_field, domain_field=domain_field)

    from moe_interp.cli.commands.runs import cell_folder
    from moe_interp.cli.inputs import read_labelled_sequences
    from moe_interp.cli.load import load_hooks
    from moe_interp.experiments.capture.experiment import capture_routing
    from moe_interp.experiments.capture.recorded import RecordedRouting

    chosen = read_labelled_sequences(files, first, **names)
    moe = load_hooks(model, device, dtype, device_map)
    labels = None if layer_names is None else [moe.layer_label(name) for name in layer_names]
    console.say(f"{console.quantity(len(chosen), 'sequence')}, {console.quantity(len(labels or moe.layers), 'layer')}")
    work_begins()
    try:
        found = capture_routing(
            moe,
            chosen,
            out=cell_folder(context, out, "sequences"),
            accumulate=(names_of_tables or True) if accumulate else None,
            layers=labels,
            stack=stack,  # type: ignore[arg-type]
            logits=logits,
            inputs=inputs,
            norms=norms,
            generate=generate,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            pad=pad,
            batch_invariant=batch_invariant,
            part_bytes=max(int(part * 2**20), 1),
            format=format,  # type: ignore[arg-type]
            memory_budget=budget,
            resume=resume,
        )
    except KeyboardInterrupt:
        console.say(f"Interrupted. The same command goes on from the finished parts in {out}.")
        raise typer.Exit(INTERRUPTED) from None
    if isinstance(found, RecordedRouting):
        console.summary(found.summary())
        console.out.print(f"\nMeasure it: moe-interp atlas {out}", markup=False, soft_wrap=True)
    else:
        console.summary(f"{found!r}")
        console.out.print(f"\nMeasure it: moe-interp atlas {out / 'counts.npz'}", markup=False, soft_wrap=True)
