"""``moe-interp geometry``: how far does routing follow from the geometry of the states that routers read?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_interp.cli import console, options
from moe_interp.cli.startup import work_begins
from moe_interp.errors import ConfigError

MATCHINGS = ("usage", "rank", "identity")


def geometry(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    sequences: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON-lines files of text, tokens, messages, or prompt and answer; with a field domain, unrelated "
            "inputs are those of different domains. Or 'demo', the bundled held-out items.",
            metavar="FILE",
        ),
    ] = None,
    prompt_field: options.PromptField = "prompt",
    answer_field: options.AnswerField = "answer",
    first: options.First = None,
    layers: options.Layers = None,
    other: Annotated[
        Path | None,
        typer.Option(help="A trace (npz, parquet) of a second model on the same sequences.", metavar="FILE"),
    ] = None,
    matching: Annotated[
        str, typer.Option(help=f"How experts of the second model are matched: {', '.join(MATCHINGS)}.")
    ] = "usage",
    generate: Annotated[
        int | None,
        typer.Option(
            help="Generate so many tokens after each prompt and compare the experts of prompt and generation.",
        ),
    ] = None,
    p: Annotated[float, typer.Option("--p", help="Share of a sequence's slots that a set of experts holds.")] = 0.8,
    max_tokens: Annotated[int, typer.Option(help="Tokens whose router inputs are kept, over all sequences.")] = 1024,
    pairs: Annotated[int, typer.Option(help="Pairs of tokens that are compared.")] = 4000,
    permutations: Annotated[int, typer.Option(help="Of Mantel's tests.")] = 999,
    random_routers: Annotated[int, typer.Option(help="Random routers on the same states.")] = 16,
    memory: options.Memory = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    seed: options.Seed = 0,
    resume: options.Resume = True,
) -> None:
    """Do similar states route alike, and how much of it would any linear router do? The linear bound, the shared
    direction, the overlap of unrelated inputs by depth, and the same token across contexts, each with its nulls.

    It needs at least 3 sequences: every interval and test is over sequences.
    """
    options.check_number("--first", first)
    options.check_number("--generate", generate)
    options.check_number("--max-tokens", max_tokens)
    options.check_number("--pairs", pairs)
    options.check_number("--permutations", permutations)
    options.check_number("--random-routers", random_routers, 2)
    options.check_one_of("--matching", matching, MATCHINGS, "a matching")
    if not 0 < p <= 1:
        raise ConfigError(f"--p {p}", "a share above 0 and at most 1", "Take 0.8.")
    options.check_common(model, device, dtype, seed, out)
    options.check_device_map(device_map, device)
    budget, layer_names = options.memory_bytes(memory), options.layer_names(layers)
    files = options.inputs("--sequences", sequences, model, "id and text, tokens, messages, or prompt and answer")
    names = options.field_names(files, prompt_field=prompt_field, answer_field=answer_field)

    from moe_interp.cli.commands.runs import cell_folder, finished_cells
    from moe_interp.cli.inputs import read_routed_sequences
    from moe_interp.cli.load import load_hooks
    from moe_interp.cli.outputs import GEOMETRY_CELLS, write_geometry
    from moe_interp.experiments.geometry import measure
    from moe_interp.report import geometry_page, write_page
    from moe_interp.traces import RoutingTrace

    second = None if other is None else RoutingTrace.read(other)
    chosen = read_routed_sequences(files, first, **names)
    moe = load_hooks(model, device, dtype, device_map)
    labels = None if layer_names is None else [moe.layer_label(name) for name in layer_names]
    console.say(f"{console.quantity(len(chosen), 'sequence')}, {len(set(labels or moe.layers))} MoE layers")
    work_begins()
    store = cell_folder(context, out / GEOMETRY_CELLS, "sequences")
    with finished_cells(store.path, resume):
        result = measure(
            moe,
            chosen,
            other=second,
            matching=matching,  # type: ignore[arg-type]
            generate=generate,
            layers=labels,
            p=p,
            max_tokens=max_tokens,
            max_pairs=pairs,
            n_permutations=permutations,
            n_random_routers=random_routers,
            memory_budget=budget,
            store=store,
            seed=seed,
        )
    write_geometry(result, out)
    write_page(out / "index.html", geometry_page(result))
    console.summary(result.summary())
    console.point_to(out / "index.html", out / "geometry.nc")
