"""``moe-interp isolate``: expert isolation and router calibration of a model on items."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_interp.cli import console, options
from moe_interp.cli.startup import work_begins


def isolate(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    items: Annotated[
        list[str] | None, typer.Option(help="JSON-lines files, or 'demo' for the bundled items.", metavar="FILE")
    ] = None,
    prompt_field: options.PromptField = "prompt",
    answer_field: options.AnswerField = "answer",
    domain_field: options.DomainField = "domain",
    domains: Annotated[str | None, typer.Option(help="Keep these domains only, e.g. math,science.")] = None,
    first: options.First = None,
    layers: options.Layers = None,
    experts: Annotated[str | None, typer.Option(help="Experts, e.g. 0,1,2+5 (a set); all by default.")] = None,
    mode: Annotated[str, typer.Option(help="force (alone) or ablate (taken away).")] = "force",
    random_draws: Annotated[int, typer.Option(help="Experts drawn for the random baseline.")] = 8,
    memory: options.Memory = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    seed: options.Seed = 0,
    resume: options.Resume = True,
) -> None:
    """Send all tokens of a layer through one expert at a time: which experts are good for which domain, and does the
    router prefer them?

    A line of --items is an object with id, domain, prompt and answer; the
    options named -field say what the last three are called there.
    """
    options.check_one_of("--mode", mode, options.MODES)
    options.check_number("--first", first)
    options.check_number("--random-draws", random_draws)
    options.check_common(model, device, dtype, seed, out)
    options.check_device_map(device_map, device)
    budget = options.memory_bytes(memory)
    layer_names, sets = options.layer_names(layers), options.expert_sets(experts)
    wanted = options.names_of("--domains", domains, "math,science")
    files = options.inputs("--items", items, model, "id, domain, prompt, answer")
    names = options.field_names(files, prompt_field=prompt_field, answer_field=answer_field, domain_field=domain_field)

    from moe_interp.cli.commands.runs import cell_folder, finished_cells
    from moe_interp.cli.inputs import announce_items, read_items
    from moe_interp.cli.load import load_hooks
    from moe_interp.cli.outputs import CELLS, write_isolation
    from moe_interp.experiments.isolation.experiment import isolate_experts
    from moe_interp.report import isolation_page, write_page

    chosen = read_items(files, wanted, first, **names)
    moe = load_hooks(model, device, dtype, device_map)
    labels = None if layer_names is None else [moe.layer_label(name) for name in layer_names]
    announce_items(chosen, len(set(labels or moe.layers)), len(sets or range(moe.spec(moe.layers[0]).n_experts)))
    work_begins()
    store = cell_folder(context, out / CELLS, "items")
    with finished_cells(store.path, resume):
        result = isolate_experts(
            moe,
            chosen,
            layers=labels,  # type: ignore[arg-type]
            experts=sets,
            mode=mode,  # type: ignore[arg-type]
            random_draws=random_draws,
            memory_budget=budget,
            seed=seed,
            store=store,
        )
    write_isolation(result, out)
    write_page(out / "index.html", isolation_page(result))
    console.summary(result.summary())
    console.point_to(out / "index.html", out / "isolation.nc")
