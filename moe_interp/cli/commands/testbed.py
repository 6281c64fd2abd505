"""``moe-interp testbed``: small MoE models under several routing strategies and seeds, side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_interp.cli import console, options
from moe_interp.cli.startup import INTERRUPTED, work_begins
from moe_interp.errors import ConfigError, DataError

DEFAULT = "none,micro_batch,global,loss_free,reference"
# fields of the configuration by what --set may give them; a test compares them with the configuration
WHOLE = (
    *("vocab_size", "length", "micro_batch", "micro_batches", "domains_per_micro_batch", "domains_per_step", "steps"),
    *("warmup_steps", "log_every", "validate_every", "checkpoint_every", "validation_sequences"),
    *("model.n_layers", "model.d_model", "model.n_heads", "model.n_experts", "model.top_k"),
    *("model.d_expert", "model.n_shared_experts", "model.max_length"),
)
OR_NONE = ("domains_per_micro_batch", "domains_per_step")
NUMBERS = (
    *("data_scale", "balance", "bias_rate", "z_coefficient", "capacity_factor", "load_decay", "lr"),
    *("muon_lr", "weight_decay", "clip", "decay_from"),
)
OTHERS = (
    *("domains", "shares", "mixed_sequences", "optimizer", "schedule", "shared_direction"),
    *("model.family", "model.norm_topk_prob"),
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs, the tables and the result.")]


def compare_strategies(
    out: Out,
    preset: Annotated[
        str,
        typer.Option(help=f"One of {', '.join(options.PRESETS)}.", autocompletion=options.completes(options.PRESETS)),
    ] = "smoke",
    strategies: Annotated[
        str,
        typer.Option(help=f"Separated by commas, of: {', '.join(options.STRATEGIES)}; joined by +: global+capacity."),
    ] = DEFAULT,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps; warm-up and intervals are shortened or lengthened likewise.")
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option(help="Generated ones, code, name=path of text, name=hub:dataset[:column]; equal shares."),
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of the configuration, e.g. lr=0.001, model.d_model=64.")
    ] = None,
    mixed_precision: Annotated[str, typer.Option(help="no, or bf16 on a GPU that has it.")] = "no",
    device: options.Device = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Run layers through torch.compile; by default where it pays."),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Read finished runs in --out back and go on with unfinished ones.")
    ] = True,
) -> None:
    """Train small MoE models under routing strategies, beside a router that knows the domains, and compare them.

    Several processes or GPUs: accelerate launch -m moe_interp.cli testbed ...
    """
    options.check_one_of("--preset", preset, options.PRESETS, "a preset")
    options.check_one_of("--mixed-precision", mixed_precision, options.PRECISIONS, "a precision")
    options.check_device(device)
    options.check_number("--steps", steps)
    options.check_out(out)
    chosen, numbers = _strategies(strategies), _numbers(seeds)
    names = options.names_of("--domains", domains, "facts,puzzles")
    for name in names or []:
        _check_domain(name)
    _check_once("--domains", [name.partition("=")[0] for name in names or []])
    changes = [_change(one) for one in change or []]

    from accelerate import PartialState
    from transformers.utils import logging as transformers_logging

    from moe_interp.cli.outputs import write_figures, write_table
    from moe_interp.plots import FIGURES
    from moe_interp.testbed.compare import compare

    transformers_logging.disable_progress_bar()  # of saving
    config = configured(preset, steps, names, changes)
    work_begins()
    try:
        run: dict[str, Any] = {"mixed_precision": mixed_precision, "device": device, "compile": compile}
        result = compare(config, chosen, numbers, out=out, resume=resume, **run)
    except KeyboardInterrupt:
        console.say(f"Interrupted. The same command goes on from the checkpoints in {out}.")
        raise typer.Exit(INTERRUPTED) from None
    if not PartialState().is_main_process:
        return
    result.save(out / "testbed.nc")
    write_table(result.table().to_csv(), out / "table.csv")
    write_table(result.runs.to_csv(index=False), out / "runs.csv")
    write_figures(result, FIGURES["testbed"], out / "figures")
    console.summary(result.summary(), soft_wrap=True)
    console.out.print(
        f"\nThe table is {out / 'table.csv'}, the runs are in runs.csv, the result in testbed.nc, figures in figures.",
        markup=False,
        soft_wrap=True,
    )


def configured(preset: str, steps: int | None, domains: list[str] | None, changes: list[tuple[str, Any]]) -> Any:
    """A preset with overrides, checked as a whole.

    Raises:
        ConfigError: A value that does not fit.
    """
    from pydantic import ValidationError

    from moe_interp.testbed.config import TestbedConfig
    from moe_interp.testbed.presets import PRESETS

    fields: dict[str, Any] = PRESETS[preset].model_dump()
    if domains is not None:
        fields |= {"domains": tuple(domains), "shares": None}
    if steps is not None:
        scale = steps / fields["steps"]
        for name in ("warmup_steps", "log_every", "validate_every", "checkpoint_every"):
            fields[name] = max(1, round(fields[name] * scale))
        fields["steps"] = steps
    for name, value in changes:
        *parents, last = name.split(".")
        (fields[parents[0]] if parents else fields)[last] = value
    try:
        return TestbedConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}={first['input']!r}", first["msg"], "Change --set.") from None


def _change(text: str) -> tuple[str, Any]:
    """``--set field=value`` as field and value."""
    name, found, written = text.partition("=")
    known = sorted((*WHOLE, *NUMBERS, *OTHERS))
    if not found or name not in known:
        expected = f"field=value with one of {', '.join(known)}"
        near = options.nearest(name, known) or "Strategy and seed have options."
        raise ConfigError(f"--set {text}", expected, near)
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        value = written
    is_number = type(value) is int or (type(value) is float and name in NUMBERS)
    if name in (*WHOLE, *NUMBERS) and not is_number and not (name in OR_NONE and value is None):
        kind = "a whole number" if name in WHOLE else "a number"
        raise ConfigError(f"--set {name}={written!r}", kind, "Change the value.")
    return name, value


def _strategies(text: str) -> list[str]:
    names = options.names_of("--strategies", text, DEFAULT) or []
    for name in names:
        for part in name.split("+"):
            if part not in options.STRATEGIES:
                expected = f"one of {', '.join(options.STRATEGIES)}, or several joined by +"
                near = options.nearest(part, options.STRATEGIES) or "Choose another."
                raise ConfigError(f"strategy {part!r}", expected, near)
    _check_once("--strategies", names)
    return names


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,18}", part) for part in parts):
        raise ConfigError(f"--seeds {text}", "integers of at least 0 such as 0,1,2", "Separate them by commas.")
    numbers = [int(part) for part in parts]
    _check_once("--seeds", numbers)
    return numbers


def _check_once(option: str, given: list[Any]) -> None:
    if repeated := [one for one in given if given.count(one) > 1]:
        raise ConfigError(f"{option} with {repeated[0]} more than once", "each once", "Name it once.")


def _check_domain(name: str) -> None:
    label, is_path, path = name.partition("=")
    if not is_path and name not in options.DOMAINS:
        expected = f"one of {', '.join(options.DOMAINS)}, name=path of text, or name=hub:dataset[:column]"
        raise ConfigError(f"domain {name!r}", expected, options.nearest(name, options.DOMAINS) or "Name another.")
    if is_path and not path.startswith("hub:") and not (label and path and options.exists(path)):
        raise DataError(f"--domains {name}, which does not exist", "name=path of text", "Check the path.")
