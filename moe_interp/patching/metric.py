"""What a metric of the logits may be, and its values on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_interp.errors import ConfigError, DataError, warn

Metric = Callable[[Tensor], Any]
"""From logits ``[batch, pos, vocab]`` to a number, or to one number an example, ``[batch]``."""

ONLY = "metric"  # the name of a metric that is given alone


class NaNMetricWarning(UserWarning):
    """A metric that is NaN in a patched run; its effect is NaN, as where there is no such cell."""


class Metrics:
    """One metric or several, evaluated on the logits of a batch.

    Args:
        metric: A function of the logits, or functions by name. Each gives a number, or one an example ``[batch]``;
            all of the same form. A batch of one example may have either form: it is one number an example.
        n_examples: Examples in the batch.

    Attributes:
        names: Of the metrics; ``("metric",)`` for one that is given alone.
        has_names: Whether they were given by name.
        is_per_example: Whether they give one number an example; known from the first call on.

    Raises:
        ConfigError: not a function, or no function.
    """

    def __init__(self, metric: Metric | Mapping[str, Metric], n_examples: int) -> None:
        self.has_names = isinstance(metric, Mapping)
        given: Any = metric
        self._functions: dict[str, Metric] = {str(k): v for k, v in given.items()} if self.has_names else {ONLY: given}
        self.n_examples, self.is_per_example, self._n_nan = n_examples, False, 0
        if not self._functions or not all(callable(function) for function in self._functions.values()):
            raise ConfigError(
                f"metric={metric!r}",
                "a function of the logits [batch, pos, vocab], or several by name",
                "Pass such as lambda logits: logits[:, -1, right] - logits[:, -1, wrong].",
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._functions)

    def first(self, logits: Tensor, of: str) -> Tensor:
        """The first call, which tells the metrics' form: ``[metric, example]``, or ``[metric, 1]`` of plain numbers.

        Args:
            logits: ``[batch, pos, vocab]``.
            of: Whose logits they are, for errors.

        Raises:
            ConfigError: a metric that gives something else, or metrics of both forms.
            DataError: NaN.
        """
        values = [self._value(name, function, logits) for name, function in self._functions.items()]
        forms = {value.ndim for value in values}
        if len(forms) > 1:
            raise ConfigError(
                "metrics of which some give one number and some one an example",
                "metrics of one form",
                "Give all of them one number an example.",
            )
        self.is_per_example = forms == {1} or self.n_examples == 1
        found = self._stacked(values)
        if bool(found.isnan().any()):
            name = self.names[int(found.isnan().any(dim=1).nonzero()[0])]
            raise DataError(
                f"a {name} of NaN on {of}", "a metric that is a number there", "Leave the example out, or mend it."
            )
        return found

    def __call__(self, logits: Tensor) -> Tensor:
        """``[metric, example]``, or ``[metric, 1]`` of plain numbers, as :meth:`first`."""
        return self._stacked([self._value(name, function, logits) for name, function in self._functions.items()])

    def noted(self, values: Tensor) -> Tensor:
        """Values of a patched run, as they are; NaN among them is counted."""
        self._n_nan += int(values.isnan().sum())
        return values

    def warn_of_nan(self) -> None:
        """Say how many values were NaN, at the end of an experiment."""
        if self._n_nan:
            warn(
                f"The metric was NaN {self._n_nan} times in patched runs: their effects are NaN, and not in means.",
                NaNMetricWarning,
            )

    def _value(self, name: str, function: Metric, logits: Tensor) -> Tensor:
        given = function(logits)  # an error of its own is the user's to read as it is
        try:
            value = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._wrong_value(name, f"{given!r:.60}, which makes no tensor ({error})") from error
        if value.shape not in ((), (self.n_examples,)):
            raise self._wrong_value(name, f"shape {tuple(value.shape)}")
        if value.is_complex():
            raise self._wrong_value(name, f"dtype {value.dtype}")
        return value if value.is_floating_point() else value.to(logits.dtype)

    def _wrong_value(self, name: str, given: str) -> ConfigError:
        called = "the metric" if name == ONLY else f"the metric {name!r}"
        return ConfigError(
            f"{called} gave {given}",
            f"one number, or one an example [{self.n_examples}]",
            "Reduce positions and vocabulary inside the metric, such as logits[:, -1, right] - logits[:, -1, wrong].",
        )

    def _stacked(self, values: list[Tensor]) -> Tensor:
        return torch.stack([value.reshape(-1) for value in values])
