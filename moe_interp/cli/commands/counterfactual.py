"""``moe-interp counterfactual``: would other experts have predicted the next token better?"""

from __future__ import annotations

from typing import Annotated

import typer

from moe_interp.cli import console, options
from moe_interp.cli.startup import work_begins
from moe_interp.errors import ConfigError


def counterfactual(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    sequences: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON-lines files of text, tokens, or prompt and answer (see above); or 'demo', the bundled held-out "
            "solutions and answers.",
            metavar="FILE",
        ),
    ] = None,
    prompt_field: options.PromptField = "prompt",
    answer_field: options.AnswerField = "answer",
    first: options.First = None,
    layers: options.Layers = None,
    routes: Annotated[int, typer.Option("--routes", "-R", help="Distinct routes a token, besides its own.")] = 32,
    sampler: Annotated[str, typer.Option(help=f"Where routes come from: {', '.join(options.SAMPLERS)}.")] = "gumbel",
    tau: Annotated[float, typer.Option(help="Temperature of gumbel.")] = 1.0,
    pool: Annotated[int | None, typer.Option(help="gumbel draws among the N most likely experts only.")] = None,
    controls: Annotated[bool, typer.Option(help="Also score what tells regret from luck.")] = True,
    method: Annotated[str, typer.Option(help="auto, branch or naive (one full forward a route).")] = "auto",
    memory: options.Memory = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the model's layers on a GPU; worth it from about a hundred thousand routes."
        ),
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    seed: options.Seed = 0,
    resume: options.Resume = True,
) -> None:
    """Score other routes of equal compute for every token, layer by layer: is the router's choice the best, and does it
    know better routes where it is not?

    A line of --sequences is a text, a list of ids, or an object of these fields:
    text, tokens (ids), messages (for the chat template), or prompt and answer;
    id; and which tokens to score, as mask (0 or 1 for each) or score_from (the
    index of the first one). Without these it is the answer where there is one,
    else all: to score a worked solution, name its field as --answer-field.
    Other fields are not read.
    """
    options.check_number("--routes", routes, expected="at least one route a token")
    options.check_number("--first", first)
    options.check_one_of("--method", method, options.METHODS)
    _check_sampler(sampler, tau, pool)
    options.check_common(model, device, dtype, seed, out)
    options.check_device_map(device_map, device)
    budget, layer_names = options.memory_bytes(memory), options.layer_names(layers)
    files = options.inputs("--sequences", sequences, model, "id and text, tokens, messages, or prompt and answer")
    names = options.field_names(files, prompt_field=prompt_field, answer_field=answer_field)

    from moe_interp.cli.commands.runs import cell_folder, finished_cells
    from moe_interp.cli.inputs import announced_sequences, read_sequence_files, route_sampler
    from moe_interp.cli.load import load_hooks
    from moe_interp.cli.outputs import ROUTE_CELLS, group_table, write_counterfactual
    from moe_interp.experiments.counterfactual.experiment import counterfactual_routes
    from moe_interp.report import counterfactual_page, write_page

    chosen = read_sequence_files(files, first, **names)
    moe = load_hooks(model, device, dtype, device_map)
    labels = None if layer_names is None else [moe.layer_label(name) for name in layer_names]
    read = announced_sequences(moe, chosen, len(set(labels or moe.layers)), routes)
    work_begins()
    store = cell_folder(context, out / ROUTE_CELLS, "sequences")
    with finished_cells(store.path, resume):
        result = counterfactual_routes(
            moe,
            read,
            layers=labels,  # type: ignore[arg-type]
            n_routes=routes,
            sampler=route_sampler(sampler, tau, pool),
            seed=seed,
            controls=controls,
            method=method,  # type: ignore[arg-type]
            memory_budget=budget,
            store=store,
            compile=compile,
        )
    write_counterfactual(result, out)
    write_page(out / "index.html", counterfactual_page(result))
    console.summary(result.summary())
    console.out.print()
    console.out.print(group_table(result))
    console.point_to(out / "index.html", out / "counterfactual.nc")


def _check_sampler(name: str, tau: float, pool: int | None) -> None:
    options.check_one_of("--sampler", name, options.SAMPLERS, "a sampler")
    options.check_positive("--tau", tau)
    options.check_number("--pool", pool)
    if name != "gumbel" and (tau, pool) != (1.0, None):
        raise ConfigError(f"--sampler {name} with --tau or --pool", "these with gumbel only", "Leave them out.")
