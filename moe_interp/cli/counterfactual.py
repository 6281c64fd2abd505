"""``moe-interp counterfactual``: would other experts have predicted the next token better?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moe_interp.cli import console
from moe_interp.cli.figures import write_figures
from moe_interp.cli.load import DEMO, Device, Dtype, Model, Seed, load_hooks
from moe_interp.cli.runs import check_out, finished_cells, layer_labels, memory_bytes
from moe_interp.errors import ConfigError
from moe_interp.experiments.counterfactual import counterfactual_routes
from moe_interp.experiments.counterfactual_result import CounterfactualResult
from moe_interp.experiments.sequence_texts import FIELDS, load_sequences, unread_fields
from moe_interp.experiments.sequences import ScoredSequence, read_sequences
from moe_interp.hooks.attach import MoEHooks
from moe_interp.plots import confidence, layer_regret, regret_curve
from moe_interp.report import counterfactual_page, write_page
from moe_interp.results.tables import unselected
from moe_interp.routes import AllSubsets, GumbelTopK, OneSwap, RouteSampler, UniformSubsets
from moe_interp.testbed.demo import load_demo_assets

FIGURES: dict[str, Callable[..., Any]] = {
    "confidence": confidence,
    "regret_curve": regret_curve,
    "layer_regret": layer_regret,
}
SAMPLERS: dict[str, Callable[[float, int | None], RouteSampler]] = {
    "gumbel": lambda tau, pool: GumbelTopK(tau, pool),
    "uniform": lambda tau, pool: UniformSubsets(),
    "one-swap": lambda tau, pool: OneSwap(),
    "all": lambda tau, pool: AllSubsets(),
}
RESULT = "counterfactual.nc"
STORE = "route_cells"  # not the folder of an isolation run

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result, the figures and the page.")]


def counterfactual(
    model: Model,
    out: Out,
    sequences: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON-lines files of text, tokens, or prompt and answer (see above); or 'demo', the bundled held-out "
            "solutions and answers."
        ),
    ] = None,
    prompt_field: Annotated[str, typer.Option(help="The field of the files that holds the prompt.")] = "prompt",
    answer_field: Annotated[
        str, typer.Option(help="The field of the files that is scored after the prompt, e.g. trajectory.")
    ] = "answer",
    first: Annotated[
        int | None, typer.Option(min=1, help="Keep the first N sequences of each file (demo: domain).")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="MoE layers, e.g. 0,3,-1; all by default.")] = None,
    routes: Annotated[int, typer.Option("--routes", "-R", help="Distinct routes a token, besides its own.")] = 32,
    sampler: Annotated[str, typer.Option(help=f"Where routes come from: {', '.join(SAMPLERS)}.")] = "gumbel",
    tau: Annotated[float, typer.Option(help="Temperature of gumbel.")] = 1.0,
    pool: Annotated[int | None, typer.Option(help="gumbel draws among the N most likely experts only.")] = None,
    controls: Annotated[bool, typer.Option(help="Also score what tells regret from luck.")] = True,
    method: Annotated[str, typer.Option(help="auto, branch or naive (one full forward a route).")] = "auto",
    memory: Annotated[float | None, typer.Option(help="Memory a pass may use, in GiB.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option(help="Go on with the finished cells in --out.")] = True,
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
    check_out(out)
    budget = memory_bytes(memory)
    sources = sequences or ([DEMO] if model == DEMO else [])
    chosen = read_sequence_files(sources, first, prompt_field, answer_field)
    draw = _sampler(sampler, tau, pool)
    moe = load_hooks(model, device, dtype)
    labels = layer_labels(moe, layers)
    read = _announced(moe, chosen, len(labels or moe.layers), routes)
    store = out / STORE
    with finished_cells(store, resume):
        result = counterfactual_routes(
            moe,
            read,
            layers=labels,  # type: ignore[arg-type]
            n_routes=routes,
            sampler=draw,
            seed=seed,
            controls=controls,
            method=method,  # type: ignore[arg-type]
            memory_budget=budget,
            store=store,
        )
    write_counterfactual(result, out)
    write_page(out / "index.html", counterfactual_page(result))
    console.out.print(escape(result.summary()))
    console.out.print()
    console.out.print(group_table(result))
    console.point_to(out / "index.html", out / RESULT)


def read_sequence_files(
    sources: list[str], first: int | None = None, prompt_field: str = "prompt", answer_field: str = "answer"
) -> list[Any]:
    """Sequences of files and of the bundled set, as :func:`moe_interp.counterfactual_routes` takes them.

    Args:
        sources: Files, or "demo".
        first: Keep so many of each file, and of each domain of the bundled set.
        prompt_field, answer_field: What the fields are called in the files.

    Raises:
        ConfigError: no file named.
        DataError: a file that cannot be read or holds no sequence, or a line that is not JSON (with its number).
    """
    if not sources:
        expected = "--sequences FILE.jsonl (id and text, tokens, messages, or prompt and answer)"
        raise ConfigError("no sequences", expected, "Or use --sequences demo.")
    names = {"prompt_field": prompt_field, "answer_field": answer_field}
    found: list[Any] = []
    for source in sources:
        found += demo_sequences(first) if source == DEMO else load_sequences(source, **names)[:first]
    return found


def demo_sequences(first: int | None = None, longest: int | None = None) -> list[dict[str, Any]]:
    """The demo's held-out trajectories: worked solutions of arithmetic, whose final answer is right, and answers.

    Args:
        first: Keep so many of each domain.
        longest: Leave out before what has more characters.
    """
    found: list[dict[str, Any]] = []
    for items in load_demo_assets().items.values():
        texts = [
            {
                "id": item.id,
                "prompt": str(item.fields.get("question", item.prompt)),
                "answer": str(item.fields.get("solution", item.answer)),
            }
            for item in items
        ]
        found += [t for t in texts if longest is None or len(t["prompt"]) + len(t["answer"]) <= longest][:first]
    return found


def _announced(moe: MoEHooks, sequences: list[Any], n_layers: int, n_routes: int) -> list[ScoredSequence]:
    """The sequences as they are scored, after saying how much that is and what of them is not read."""
    read = read_sequences(moe.bridge, sequences)
    parts = [
        console.quantity(len(read), "sequence"),
        console.quantity(sum(int(one.is_scored.sum()) for one in read), "token") + " to score",
        console.quantity(n_layers, "MoE layer"),
        console.quantity(n_routes, "route") + " a token",
    ]
    console.say(", ".join(parts))
    if unread := unread_fields(sequences):
        named = ", ".join(f"{name} (of {console.quantity(n, 'sequence')})" for name, n in unread.items())
        console.say(f"Not read: {named}. The fields that are read: {', '.join(FIELDS)}.")
    return read


def write_counterfactual(result: CounterfactualResult, out: Path) -> None:
    """The result, and those of its figures that can be drawn as SVG files."""
    result.save(out / RESULT)
    write_figures(result, FIGURES, out / "figures")


def group_table(result: CounterfactualResult) -> Any:
    """Regret and alignment by class of confidence and by layer, for the terminal."""
    classes = result.by_confidence(by=unselected(result.data))
    layers = result.by_layer()
    named = [(row["class"], row) for row in classes.to_dict("records")]
    named += [(f"layer {row['layer']}", row) for row in layers.to_dict("records")]

    def shown(row: Any, name: str, digits: int) -> str:
        value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
        if math.isnan(low):
            return "–" if math.isnan(value) else f"{value:.{digits}f}"
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    rows = [
        [str(name), row["n_tokens"], shown(row, "regret", 3), shown(row, "alignment", 2), row["verdict"]]
        for name, row in named
    ]
    return console.table("", ["", "tokens", "regret (nats)", "alignment", "router is"], rows)


def _sampler(name: str, tau: float, pool: int | None) -> RouteSampler:
    if name not in SAMPLERS:
        raise ConfigError(f"--sampler {name}", f"one of {', '.join(SAMPLERS)}", "Choose a sampler.")
    if name != "gumbel" and (tau, pool) != (1.0, None):
        raise ConfigError(f"--sampler {name} with --tau or --pool", "these with gumbel only", "Leave them out.")
    return SAMPLERS[name](tau, pool)
