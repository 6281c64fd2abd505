"""``moe-interp tune-router``: can the router alone be taught to take better routes?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_interp.cli import console, options
from moe_interp.cli.startup import INTERRUPTED, work_begins
from moe_interp.errors import ConfigError

OBJECTIVES = ("epo", "cross_entropy", "listwise", "distill")
SCHEDULES = ("constant", "linear", "cosine")
CLASSES = ("all", "fragile", "middle", "confident")


def tune_router(
    model: options.Model,
    out: options.Out,
    sequences: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON-lines files to train on, as for `counterfactual`; or 'demo', the bundled solutions and answers.",
            metavar="FILE",
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Files to evaluate on; by default a fifth of --sequences.", metavar="FILE"),
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option("--other-domain", help="Files of other domains to evaluate on, one domain each.", metavar="FILE"),
    ] = None,
    prompt_field: options.PromptField = "prompt",
    answer_field: options.AnswerField = "answer",
    first: options.First = None,
    layers: options.Layers = None,
    objective: Annotated[str, typer.Option(help=f"{', '.join(OBJECTIVES)}.")] = "epo",
    select: Annotated[
        str, typer.Option(help="Tokens to train on: those that lose more than so many nats, or " + ", ".join(CLASSES))
    ] = "0.1",
    routes: Annotated[int, typer.Option("--routes", "-R", help="Routes drawn a token.")] = 32,
    sampler: Annotated[str, typer.Option(help=f"Where routes come from: {', '.join(options.SAMPLERS)}.")] = "gumbel",
    tau: Annotated[float, typer.Option(help="Temperature of gumbel.")] = 0.1,
    pool: Annotated[int, typer.Option(help="gumbel draws among the N most likely experts only; 0 for all.")] = 32,
    beta: Annotated[float, typer.Option(help="Of epo.")] = 0.1,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-4,
    schedule: Annotated[str, typer.Option(help=f"Of the learning rate: {', '.join(SCHEDULES)}.")] = "constant",
    batch_size: Annotated[int, typer.Option(help="Tokens a step.")] = 16,
    epochs: Annotated[int, typer.Option(help="Passes over the tokens.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Stop the schedule after so many steps.")] = None,
    merge: Annotated[
        Path | None, typer.Option(help="Also write the tuned model's checkpoint to this new folder.")
    ] = None,
    memory: options.Memory = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    resume: options.Resume = True,
) -> None:
    """Train the router of the last MoE layer (or of others), and nothing else, towards better routes; and measure on
    held-out text what was learned: cross-entropy, and whether better routes are taken or only preferred.

    Writes router_tuning.nc, the weights' change router_delta.safetensors, figures and a page. An interrupted run goes
    on from its checkpoint. Several processes or GPUs: accelerate launch -m moe_interp.cli tune-router ...
    """
    options.check_one_of("--objective", objective, OBJECTIVES)
    options.check_one_of("--schedule", schedule, SCHEDULES)
    options.check_one_of("--sampler", sampler, options.SAMPLERS, "a sampler")
    for name, number in (("--routes", routes), ("--batch-size", batch_size), ("--epochs", epochs), ("--first", first)):
        options.check_number(name, number)
    options.check_number("--max-steps", max_steps)
    options.check_number("--pool", pool, 0)
    for name, value in (("--tau", tau), ("--beta", beta), ("--lr", lr)):
        options.check_positive(name, value)
    selected = _selected(select)
    options.check_common(model, device, dtype, seed, out)
    budget, layer_names = options.memory_bytes(memory), options.layer_names(layers)
    if merge is not None and options.exists(merge):
        raise ConfigError(f"--merge {merge}, which is there already", "a new folder", "Choose another.")
    fields = "id and text, tokens, messages, or prompt and answer"
    files = options.inputs("--sequences", sequences, model, fields)
    names = options.field_names(files, prompt_field=prompt_field, answer_field=answer_field)
    held = options.inputs("--held-out", held_out, model, fields) if held_out else None
    others = options.inputs("--other-domain", other, model, fields) if other else []

    from moe_interp.cli.inputs import read_sequence_files, route_sampler
    from moe_interp.cli.load import checkpoint_folder, load_hooks
    from moe_interp.cli.outputs import write_router_tuning
    from moe_interp.experiments.router_tuning import experiment
    from moe_interp.processes import accelerator

    processes = accelerator()
    if processes.num_processes > 1:
        if device is not None:
            given = f"--device {device} for {processes.num_processes} processes"
            raise ConfigError(given, "no device: each process has its own", "Leave it out.")
        device = str(processes.device)
    train = read_sequence_files(files, first, **names)
    evaluated = read_sequence_files(held, first, **names) if held else None
    domains = {Path(name).stem: read_sequence_files([name], first, **names) for name in others}
    moe = load_hooks(model, device, dtype)
    labels = -1 if layer_names is None else [moe.layer_label(name) for name in layer_names]
    source = checkpoint_folder(model) if merge is not None else None
    work_begins()
    if not resume and processes.is_main_process:
        (out / experiment.STATE).unlink(missing_ok=True)
    processes.wait_for_everyone()
    try:
        result = experiment.tune_router(
            moe,
            train,
            labels,
            objective,  # type: ignore[arg-type]
            held_out=evaluated,
            other_domains=domains,
            select=selected,
            sampler=route_sampler(sampler, tau, pool or None),
            n_routes=routes,
            beta=beta,
            lr=lr,
            schedule=schedule,
            batch_size=batch_size,
            epochs=epochs,
            max_steps=max_steps,
            seed=seed,
            memory_budget=budget,
            out=out,
            resume=True,
        )
    except KeyboardInterrupt:
        console.say(f"Interrupted. The same command goes on from the checkpoint in {out}.")
        raise typer.Exit(INTERRUPTED) from None
    if not processes.is_main_process:
        return
    write_router_tuning(result, out)
    console.summary(result.summary())
    if merge is not None and source is not None:
        result.merge(source, merge)
        console.say(f"The tuned model is in {merge}.")
    console.point_to(out / "index.html", out / "router_tuning.nc")


def _selected(select: str) -> float | str | None:
    if select == "all":
        return None
    if select in CLASSES:
        return select
    try:
        value = float(select)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        expected = f"a number of nats, or one of {', '.join(CLASSES)}"
        raise ConfigError(f"--select {select}", expected, options.nearest(select, CLASSES) or "Leave it out for 0.1.")
    return value
