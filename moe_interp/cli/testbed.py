"""``moe-interp testbed``: small MoE models under several routing strategies and seeds, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState
from pydantic import ValidationError
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from moe_interp.cli import console
from moe_interp.errors import ConfigError
from moe_interp.testbed.compare import compare
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.model import ModelConfig
from moe_interp.testbed.presets import PRESETS
from moe_interp.testbed.strategies import STRATEGIES

DEFAULT = "none,micro_batch,global,loss_free,reference"

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs, the tables and the result.")]


def compare_strategies(
    out: Out,
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "smoke",
    strategies: Annotated[
        str, typer.Option(help=f"Separated by commas, of: {', '.join(STRATEGIES)}; joined by +: global+capacity.")
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
    resume: Annotated[
        bool, typer.Option(help="Read finished runs in --out back and go on with unfinished ones.")
    ] = True,
) -> None:
    """Train small MoE models under routing strategies, beside a router that knows the domains, and compare them.

    Several processes or GPUs: accelerate launch -m moe_interp.cli testbed ...
    """
    transformers_logging.disable_progress_bar()  # of saving
    config = configured(preset, steps, domains, change or [])
    result = compare(
        config,
        [part.strip() for part in strategies.split(",") if part.strip()],
        _numbers(seeds),
        out=out,
        resume=resume,
        mixed_precision=mixed_precision,
    )
    if not PartialState().is_main_process:
        return
    result.save(out / "testbed.nc")
    result.table().to_csv(out / "table.csv")
    result.runs.to_csv(out / "runs.csv", index=False)
    console.out.print(escape(result.summary()), soft_wrap=True)
    console.out.print(
        f"\nThe table is {escape(str(out / 'table.csv'))}, the runs are in runs.csv, the result in testbed.nc."
    )


def configured(preset: str, steps: int | None, domains: str | None, changes: list[str]) -> TestbedConfig:
    """A preset with overrides, checked as a whole.

    Raises:
        ConfigError: No such preset or field, or a value that does not fit.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}", f"one of {', '.join(PRESETS)}", "Choose one; --set changes its fields.")
    fields: dict[str, Any] = PRESETS[preset].model_dump()
    if domains is not None:
        fields |= {"domains": tuple(part.strip() for part in domains.split(",")), "shares": None}
    if steps is not None and steps > 0:
        scale = steps / fields["steps"]
        for name in ("warmup_steps", "log_every", "validate_every", "checkpoint_every"):
            fields[name] = max(1, round(fields[name] * scale))
    fields |= {} if steps is None else {"steps": steps}
    for change in changes:
        _set(fields, change)
    try:
        return TestbedConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}={first['input']!r}", first["msg"], "Change --set.") from None


def _set(fields: dict[str, Any], change: str) -> None:
    name, found, text = change.partition("=")
    *parents, last = name.split(".")
    known = set(TestbedConfig.model_fields) | {f"model.{field}" for field in ModelConfig.model_fields}
    if not found or name not in known - {"model", "strategy", "seed"}:
        raise ConfigError(
            f"--set {change}", f"field=value with one of {', '.join(sorted(known))}", "Strategy and seed have options."
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    (fields[parents[0]] if parents else fields)[last] = value


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}", "integers such as 0,1,2", "Separate them by commas.") from None
