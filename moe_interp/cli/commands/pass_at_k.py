"""``moe-interp pass-at-k``: is one of K sampled completions right?"""

from __future__ import annotations

from typing import Annotated

import typer

from moe_interp.cli import console, options
from moe_interp.cli.startup import INTERRUPTED, work_begins
from moe_interp.errors import ConfigError

HUB = "hub:"


def pass_at_k(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    problems: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON-lines files of prompt (or messages) and answer; hub:NAME or hub:NAME:SPLIT, a data set; or "
            "'demo', the bundled held-out word problems.",
            metavar="FILE",
        ),
    ] = None,
    prompt_field: options.PromptField = "prompt",
    answer_field: Annotated[
        str, typer.Option(help="The field that holds the right answer.", metavar="NAME")
    ] = "answer",
    domain_field: options.DomainField = "domain",
    first: Annotated[int | None, typer.Option(help="Use the first N problems of each source.")] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Completions a problem.")] = 160,
    k: Annotated[str, typer.Option("--k", help="The K, separated by commas, each at most --samples.")] = "1,8,64",
    temperature: Annotated[float, typer.Option(help="Temperature of the softmax; 0 is greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Mass of the nucleus that is sampled from; 1 is everything.")] = 0.95,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a completion at most; by default what the context leaves, 512 at most."),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a completion; may be repeated.")] = None,
    checker: Annotated[
        str, typer.Option(help=f"What a right completion is: {', '.join(options.CHECKERS)} (formulas, by math-verify).")
    ] = "number",
    batch_size: Annotated[
        int | None, typer.Option(help="Completions of a pass; by default what fits, 64 on a CPU.")
    ] = None,
    memory: options.Memory = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    seed: options.Seed = 0,
    resume: Annotated[bool, typer.Option(help="Go on with the completions in --out.")] = True,
) -> None:
    """Sample completions of every problem, check them, and estimate pass@K without bias.

    A problem is an object of these fields: prompt or messages (for the chat
    template), answer; and id and domain, if it has them. Completions are kept
    in completions.jsonl as they come: the same command goes on from there,
    also with more --samples.
    """
    ks = _whole_numbers(k)
    options.check_number("--samples", samples)
    options.check_number("--first", first)
    options.check_number("--max-new-tokens", max_new_tokens)
    options.check_number("--batch-size", batch_size)
    if max(ks) > samples:
        raise ConfigError(
            f"--k {max(ks)} with --samples {samples}", "samples of at least K", "Raise --samples or change --k."
        )
    if not temperature >= 0:
        raise ConfigError(f"--temperature {temperature}", "a number of at least 0", "0 is greedy.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p}", "a number above 0, of at most 1", "1 is all of the vocabulary.")
    options.check_one_of("--checker", checker, options.CHECKERS, "a checker")
    options.check_common(model, device, dtype, seed, out)
    options.check_device_map(device_map, device)
    budget = options.memory_bytes(memory)
    hub = [name for name in problems or [] if name.startswith(HUB)]
    files = [name for name in problems or [] if not name.startswith(HUB)]
    if files or not hub:
        files = options.inputs("--problems", files, model, "prompt and answer")
    names = options.field_names(
        [*files, *hub], prompt_field=prompt_field, answer_field=answer_field, domain_field=domain_field
    )

    from moe_interp.cli.commands.runs import cell_folder
    from moe_interp.cli.inputs import read_problems
    from moe_interp.cli.load import load_hooks
    from moe_interp.cli.outputs import COMPLETIONS, pass_at_k_table, write_pass_at_k
    from moe_interp.experiments.pass_at_k.experiment import evaluate_pass_at_k
    from moe_interp.report import pass_at_k_page, write_page

    chosen = read_problems([*files, *hub], first, **names)
    moe = load_hooks(model, device, dtype, device_map)
    console.say(f"{console.quantity(len(chosen), 'problem')}, {console.quantity(samples, 'completion')} each")
    work_begins()
    store = cell_folder(context, out / COMPLETIONS, "problems")
    try:
        result = evaluate_pass_at_k(
            moe,
            chosen,
            n_samples=samples,
            ks=ks,
            temperature=temperature,
            top_p=top_p,
            is_correct=checker,
            max_new_tokens=max_new_tokens,
            stop=stop or (),
            seed=seed,
            batch_size=batch_size,
            memory_budget=budget,
            store=store,
            resume=resume,
        )
    except KeyboardInterrupt:
        console.say(f"Interrupted. The same command goes on from the completions in {store.path}.")
        raise typer.Exit(INTERRUPTED) from None
    write_pass_at_k(result, out)
    write_page(out / "index.html", pass_at_k_page(result))
    console.summary(result.summary())
    console.out.print()
    console.out.print(pass_at_k_table(result))
    console.point_to(out / "index.html", out / "pass_at_k.nc")


def _whole_numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < len(part) < 10 and int(part) for part in parts):
        raise ConfigError(f"--k {text}", "whole numbers of at least 1, such as 1,8,64", "Separate them by commas.")
    return tuple(int(part) for part in parts)
