"""The folder of a run: its configuration, log, checkpoint and model; what may be continued, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_interp.disk import LARGEST_JSON, read_bytes, read_json
from moe_interp.errors import MoEInterpError, ResultError
from moe_interp.results.files import replacing
from moe_interp.testbed.config import TestbedConfig

Record = dict[str, Any]
RESTORE = "Restore it, or choose another folder."


class RunFolder:
    """``config.json``, ``run.json``, ``metrics.jsonl`` (a record a line), ``state.pt`` and, once finished, ``model/``.

    ``run.json`` holds what the configuration does not say and changes numbers all the same, such as the checksum of the
    data; of a finished run also that of the log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.run, self.log = path / "config.json", path / "run.json", path / "metrics.jsonl"
        self.state, self.model = path / "state.pt", path / "model"

    def check(self, config: TestbedConfig, resume: bool, origin: Record | None = None) -> None:
        """Refuse what this configuration may not continue; a folder without checkpoint and model is free.

        Args:
            config: The configuration.
            resume: Whether a run may be continued.
            origin: What ``run.json`` must say; what is not known yet is left out.

        Raises:
            ResultError: A run is there and ``resume`` is False; or it is of another configuration, of other data or
                precision, or unreadable.
        """
        if not (self.state.exists() or self.model.exists()):
            return
        if not resume:
            raise ResultError(
                f"{self.path} already holds a run", "an empty folder, or resume", "Resume, or change out."
            )
        there, described = self._read_config(), self._read_run()
        changes = _changes(there.model_dump(mode="json"), config.model_dump(mode="json"))
        changes += _changes({name: described.get(name) for name in origin or {}}, origin or {})
        if changes:
            raise ResultError(
                f"{self.path} holds a run of another configuration: {', '.join(changes)}",
                "the very same configuration and data",
                "Resume with the configuration saved there, or choose another folder.",
            )

    def finished(self) -> list[Record] | None:
        """The log of a run whose model is saved, or None.

        Raises:
            ResultError: the log was changed since, or cannot be read.
        """
        if not self.model.is_dir():
            return None
        expected = "the log of the finished run"
        content = read_bytes(self.log, expected, RESTORE, ResultError, LARGEST_JSON)
        kept = self._read_run().get("log")
        if kept is None:
            return None  # killed before it was all written: training goes on from the checkpoint, at its end
        if kept != hashlib.sha256(content).hexdigest():
            raise ResultError(f"{self.log} was changed after the run had finished", expected, RESTORE)
        return [json.loads(line) for line in content.splitlines()]

    def open(self, config: TestbedConfig, history: Sequence[Record], origin: Record) -> None:
        """Write the configuration, and the log up to the checkpoint: later records are made again.

        Raises:
            ResultError: the system refuses a write.
        """
        self._write(self.config, config.model_dump_json(indent=2) + "\n")
        self._write(self.run, json.dumps(origin, indent=1) + "\n")
        self._write(self.log, "".join(json.dumps(record) + "\n" for record in history))

    def close(self, origin: Record) -> None:
        """Note that the run is finished, and which log is its own."""
        log = read_bytes(self.log, "the log of this run", RESTORE, ResultError, LARGEST_JSON)
        self._write(self.run, json.dumps(origin | {"log": hashlib.sha256(log).hexdigest()}, indent=1) + "\n")

    def add(self, record: Record) -> None:
        """Append a record to the log.

        Raises:
            ResultError: the system refuses the write.
        """
        try:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:
            raise ResultError(
                f"{self.log} could not be written: {error.strerror or error}",
                "a folder with room for it and permission to write",
                "Free space, and resume: the last checkpoint is kept.",
            ) from error

    def _write(self, path: Path, text: str) -> None:
        with replacing(path) as file:
            file.write(text.encode())

    def _read_config(self) -> TestbedConfig:
        expected = "the configuration of the run beside it"
        content = read_bytes(self.config, expected, RESTORE, ResultError, LARGEST_JSON)
        try:
            return TestbedConfig.model_validate_json(content)
        except (ValidationError, MoEInterpError, ValueError, OverflowError) as error:
            raise ResultError(f"{self.config} cannot be read ({type(error).__name__})", expected, RESTORE) from None

    def _read_run(self) -> Record:
        found = read_json(self.run, "what the run beside it was made from", RESTORE, ResultError)
        if not isinstance(found, dict):
            raise ResultError(f"{self.run} holds a {type(found).__name__}", "a JSON object", RESTORE)
        return found


def _changes(there: Record, here: Record) -> list[str]:
    return [f"{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]
