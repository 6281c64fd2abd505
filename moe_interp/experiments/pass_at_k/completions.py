"""Completions on disk: one JSON line each, written as it is finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moe_interp.disk import parse_json, read_bytes
from moe_interp.errors import ResultError, warn
from moe_interp.jsonlines import LARGEST_LINES
from moe_interp.results.cells import CellFolder, DamagedCellWarning
from moe_interp.results.files import replacing
from moe_interp.results.plans import Options, difference

HEADER = "moe_interp_completions"
FINISHES = ("eos", "stop", "length")


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        problem, sample: The problem's id, and the completion's number among its samples.
        seed: What its tokens were drawn with.
        text: Without special tokens, up to a stop string.
        ids: All that was sampled, an end-of-sequence token included.
        finish: Why it ended: "eos", "stop" (a stop string) or "length".
        correct: What the checker said; None where it raised.
        error: What it raised.
    """

    problem: str
    sample: int
    seed: int
    text: str
    ids: tuple[int, ...]
    finish: str
    correct: bool | None
    error: str | None = None

    @classmethod
    def of(cls, record: Any) -> Completion:
        """Of a line's object.

        Raises:
            ValueError: fields that are missing or of other types.
        """
        try:
            found = cls(**{**record, "ids": tuple(record["ids"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no completion ({error})") from error
        is_right = (
            isinstance(found.problem, str)
            and all(type(number) is int for number in (found.sample, found.seed, *found.ids))
            and isinstance(found.text, str)
            and found.finish in FINISHES
            and (found.correct is None or type(found.correct) is bool)
            and (found.error is None or isinstance(found.error, str))
        )
        if not is_right:
            raise ValueError("no completion (a field of another type)")
        return found

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


class CompletionFile:
    """Completions of one plan, in a file or, without a path, in memory alone.

    The first line holds the plan. A completion that stands there twice counts as it stands last. A last line that was
    torn off is cut away, and lines that are damaged are left out, with a warning: their completions are drawn again,
    with the same seeds.

    Args:
        path: The file; made with the first completion. A :class:`CellFolder` brings the options of the command line.
        plan: What is computed, as JSON values: see :mod:`moe_interp.results.plans`.
        resume: Go on with what is there; else it is replaced.

    Raises:
        ResultError: a file of another plan, or of something else.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, plan: Mapping[str, Any] | None = None, resume: bool = True
    ) -> None:
        self.path = None if path is None else Path(path)
        self._options: Options = dict(path.options) if isinstance(path, CellFolder) else {}
        self._plan: dict[str, Any] = json.loads(json.dumps(plan or {}))
        self._file: BinaryIO | None = None
        self.found: dict[tuple[str, int], Completion] = {}
        self._has_header = False
        if self.path is not None and os.path.lexists(self.path):
            if self.path.is_dir():
                raise ResultError(
                    f"{str(self.path)!r}, a folder", "a file to keep completions in", "Name a file in it."
                )
            if resume:
                self._read()
        self._is_replaced = not self._has_header

    def add(self, completion: Completion) -> None:
        """Keep a completion; it is with the system when this returns.

        Raises:
            ResultError: the system refuses the write.
        """
        self.found[completion.problem, completion.sample] = completion
        if self.path is None:
            return
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            self._file.write(completion.line())
            self._file.flush()
        except OSError as error:
            raise ResultError(
                f"{str(self.path)!r} could not be written: {error.strerror or error}",
                "a file with room for it and permission to write",
                "Free space or choose another path; the same call goes on from what is there.",
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        assert self.path is not None
        if self._is_replaced:
            with replacing(self.path) as out:
                out.write(self._header())
            self._is_replaced = False
        self._file = self.path.open("ab")

    def _header(self) -> bytes:
        options = {name: list(value) for name, value in self._options.items()}
        return json.dumps({HEADER: 1, "plan": self._plan, "options": options}).encode() + b"\n"

    def _read(self) -> None:
        assert self.path is not None
        content = read_bytes(self.path, "a file of completions", error=ResultError, limit=LARGEST_LINES)
        lines = content.split(b"\n")
        is_torn, lines = bool(lines[-1]), lines if lines[-1] else lines[:-1]
        if not lines:
            return
        header = _parsed(lines[0])
        if not isinstance(header, dict) or HEADER not in header:
            if len(lines) == 1 and is_torn and (not header) and f'{{"{HEADER}'.encode().startswith(lines[0][:20]):
                return  # a header that was torn off: nothing is lost
            raise ResultError(
                f"{str(self.path)!r}, which does not begin as a file of completions",
                "a file that evaluate_pass_at_k wrote, or a new name",
                "Choose another file.",
            )
        options = {name: (entry, value) for name, (entry, value) in header.get("options", {}).items()}
        if what := difference(header.get("plan", {}), self._plan, options, self._options):
            raise ResultError(
                f"{str(self.path)!r} holds completions of another run ({what})",
                "completions of the same model, problems and options",
                "Choose another file, delete this one (as --no-resume does on the command line), or repeat the run "
                "with its options.",
            )
        self._has_header = True
        self._take(lines[1:], is_torn)

    def _take(self, lines: list[bytes], is_torn: bool) -> None:
        """The completions of lines; the file anew where one of them cannot be read."""
        damaged = []
        for number, line in enumerate(lines, 2):
            try:
                completion = Completion.of(parse_json(line.decode()))
                self.found[completion.problem, completion.sample] = completion
            except ValueError:
                damaged.append(number)
        is_last_alone = is_torn and damaged == [len(lines) + 1]
        if damaged and not is_last_alone:
            named = ", ".join(map(str, damaged[:5])) + (" and more" if len(damaged) > 5 else "")
            warn(f"{self.path}: line {named} cannot be read; its completion is drawn again", DamagedCellWarning)
        if damaged or is_torn:
            assert self.path is not None
            with replacing(self.path) as out:
                out.write(self._header() + b"".join(one.line() for one in self.found.values()))


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line.decode())
    except ValueError:
        return None


def read_completions(path: str | Path) -> list[Completion]:
    """The completions of a file that :func:`moe_interp.evaluate_pass_at_k` wrote, in the order of their lines.

    Raises:
        ResultError: another file, or a line that cannot be read (a last one that was torn off is passed over).
    """
    content = read_bytes(Path(path), "a file of completions", error=ResultError, limit=LARGEST_LINES)
    header, *lines = content.split(b"\n")
    parsed = _parsed(header)
    if not isinstance(parsed, dict) or HEADER not in parsed:
        raise ResultError(
            f"{str(path)!r}, which holds no completions", "a file that evaluate_pass_at_k wrote", "Check it."
        )
    found: dict[tuple[str, int], Completion] = {}
    for number, line in enumerate(lines[:-1], 2):
        try:
            completion = Completion.of(parse_json(line.decode()))
        except ValueError as error:
            raise ResultError(f"{path}, line {number}: {error}", "a completion", "Delete the line.") from error
        found[completion.problem, completion.sample] = completion
    return list(found.values())
