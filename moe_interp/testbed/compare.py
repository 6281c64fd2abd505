"""A grid of runs: every strategy with every seed, finished runs read back and unfinished ones resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_interp.errors import ConfigError
from moe_interp.testbed.comparison import ComparisonResult, comparison
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.domains.registry import has_text_files, load_domains
from moe_interp.testbed.strategies.table import check_strategy
from moe_interp.testbed.training.compilation import Compile, check_compile
from moe_interp.testbed.training.run_folder import RunFolder
from moe_interp.testbed.training.train import check_device, described_method, described_run, train


def compare(
    config: TestbedConfig,
    strategies: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    out: Path | str | None = None,
    domains: Sequence[Domain] | None = None,
    resume: bool = True,
    progress: bool = True,
    mixed_precision: str = "no",
    device: str | torch.device | None = None,
    compile: Compile = None,
) -> ComparisonResult:
    """Train every strategy with every seed. Everything that can be refused is refused before the first run.

    Args:
        config: Everything but strategy and seed.
        out: A folder for the runs' own, ``<strategy>-seed<seed>``.
        domains: The data of every run; by default the configuration's, generated anew for each seed.
        resume: Read back the finished runs in ``out`` and go on with an unfinished one.
        mixed_precision, device, compile: As for :func:`moe_interp.testbed.train`.

    Raises:
        ConfigError: No strategy or seed, one given twice, a strategy that cannot be made, or a device that is not
            there.
        ResultError: ``out`` holds runs of another configuration or of text files that have changed since, or any and
            ``resume`` is False.
        TrainingError: As for ``train``; finished runs are kept.
    """
    check_device(device)
    check_compile(compile)
    for given in (strategies, seeds):
        if not given or len(set(given)) < len(given):
            raise ConfigError(
                f"strategies {list(strategies)}, seeds {list(seeds)}", "at least one of each, each once", "Name some."
            )
    names = config.domains if domains is None else [domain.name for domain in domains]
    cells: dict[tuple[str, int], tuple[TestbedConfig, RunFolder | None]] = {}
    for strategy in strategies:
        check_strategy(strategy, config, names)
        for seed in seeds:
            cell = config.model_copy(update={"strategy": strategy, "seed": seed})
            folder = None if out is None else RunFolder(Path(out) / f"{strategy}-seed{seed}")
            if folder is not None:
                known = domains
                # other data that the configuration names are the same whenever they are made
                if known is None and resume and folder.model.exists() and has_text_files(cell):
                    known = load_domains(cell)
                method = described_method(mixed_precision)
                folder.check(cell, resume, method if known is None else described_run(known, mixed_precision))
            cells[strategy, seed] = cell, folder
    histories: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for seed in seeds:  # seed by seed, so that the strategies share the data, and an early stop leaves whole seeds
        data = domains
        for strategy in strategies:
            cell, folder = cells[strategy, seed]
            log = None if folder is None else folder.finished()
            if log is None:
                data = load_domains(cell) if data is None else data
                path = None if folder is None else folder.path
                options: dict[str, Any] = {"progress": progress, "mixed_precision": mixed_precision}
                options |= {"device": device, "compile": compile}
                log = train(cell, domains=data, out=path, resume=resume, **options).history
            histories[strategy, seed] = log
    return comparison(
        config, {(strategy, seed): histories[strategy, seed] for strategy in strategies for seed in seeds}
    )
