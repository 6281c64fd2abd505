"""One base error and its few children. Every message has three parts: what was given, what was expected, what to do."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

_INSIDE = (str(Path(__file__).parent), contextlib.__file__)
_OF_TORCH = str(Path("torch", "utils", "_contextlib.py"))


class MoEInterpError(Exception):
    """Base of every error that moe_interp raises on purpose.

    Args:
        given: What was found, with its value.
        expected: What would have been accepted.
        remedy: What the user can do now.
    """

    def __init__(self, given: str, expected: str, remedy: str) -> None:
        self.given, self.expected, self.remedy = given, expected, remedy
        super().__init__(f"{given.rstrip('.')}. Expected: {expected.rstrip('.')}. {remedy}")

    def __reduce__(self) -> tuple[type[MoEInterpError], tuple[str, str, str]]:
        return type(self), (self.given, self.expected, self.remedy)


class AttachError(MoEInterpError):
    """A model that cannot be attached to, or is in the wrong state for attaching or detaching."""


class HookError(MoEInterpError):
    """A hook that does not exist on this model, or an edit of a hooked activation that makes no sense."""


class RouteError(MoEInterpError):
    """Experts, weights or routes that no token can take."""


class DataError(MoEInterpError):
    """Items, sequences or files that an experiment cannot use."""


class ConfigError(MoEInterpError):
    """Options that are out of range or contradict each other."""


class ResultError(MoEInterpError):
    """A saved result, trace or checkpoint that cannot be read, or does not belong to this run."""


class TrainingError(MoEInterpError):
    """A training run that cannot go on, such as one with a non-finite loss."""


def first_sentence(error: BaseException) -> str:
    """The first sentence of what an error of another library says: some say all that it might have been."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the user's own line: the nearest one outside of the package and its decorators."""
    frame, level = sys._getframe(0), 1
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def _is_inside(file: str) -> bool:
    """Whether a line of the package, or of what it is decorated with."""
    return file.startswith(_INSIDE) or file.endswith(_OF_TORCH)
