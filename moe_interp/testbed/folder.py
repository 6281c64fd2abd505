"""The folder of a run: its configuration, log, checkpoint and model; what may be continued, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_interp.errors import ResultError
from moe_interp.testbed.config import TestbedConfig


class RunFolder:
    """``config.json``, ``metrics.jsonl`` (one record a line), ``state.pt`` and, once finished, ``model/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.log = path / "config.json", path / "metrics.jsonl"
        self.state, self.model = path / "state.pt", path / "model"

    def check(self, config: TestbedConfig, resume: bool) -> None:
        """Refuse what this configuration may not continue; a folder without checkpoint and model is free.

        Raises:
            ResultError: A run is there and ``resume`` is False; or it is of another configuration, or unreadable.
        """
        if not (self.state.exists() or self.model.exists()):
            return
        if not resume:
            raise ResultError(
                f"{self.path} already holds a run", "an empty folder, or resume", "Resume, or change out."
            )
        try:
            there = TestbedConfig.model_validate_json(self.config.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise ResultError(
                f"{self.config} cannot be read ({type(error).__name__})",
                "the configuration of the run beside it",
                "Restore it, or choose another folder.",
            ) from None
        if there != config:
            raise ResultError(
                f"{self.path} holds a run of another configuration: {_changes(there, config)}",
                "the very same configuration",
                "Resume with the configuration saved there, or choose another folder.",
            )

    def finished(self) -> list[dict[str, Any]] | None:
        """The log of a run whose model is saved, or None."""
        if not self.model.is_dir():
            return None
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]

    def open(self, config: TestbedConfig, history: Sequence[dict[str, Any]]) -> None:
        """Write the configuration, and the log up to the checkpoint: later records are made again."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.config.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        self.log.write_text("".join(json.dumps(record) + "\n" for record in history), encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Append a record to the log."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")


def _changes(there: TestbedConfig, here: TestbedConfig) -> str:
    old, new = there.model_dump(mode="json"), here.model_dump(mode="json")
    return ", ".join(f"{name} {old[name]} there, {new[name]} here" for name in old if old[name] != new[name])
