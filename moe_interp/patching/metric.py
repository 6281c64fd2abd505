"""What a metric of the logits may be, and its values on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_interp.errors import ConfigError, DataError

Metric = Callable[[Tensor], Any]
"""From logits ``[batch, pos, vocab]`` to a number, or to one number an example, ``[batch]``."""

ONLY = "metric"  # the name of a metric that is given alone


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
        self.n_examples, self.is_per_example = n_examples, False
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

    def _value(self, name: str, function: Metric, logits: Tensor) -> Tensor:
        try:
            value = torch.as_tensor(function(logits))
        except (TypeError, ValueError) as error:
            if isinstance(error, ValueError) and "tensor" not in str(error):
                raise
            raise self._misfit(name, f"what makes no tensor ({error})") from error
        if value.shape not in ((), (self.n_examples,)):
            raise self._misfit(name, f"shape {tuple(value.shape)}")
        if value.is_complex():
            raise self._misfit(name, f"dtype {value.dtype}")
        return value if value.is_floating_point() else value.to(logits.dtype)

    def _misfit(self, name: str, given: str) -> ConfigError:
        called = "the metric" if name == ONLY else f"the metric {name!r}"
        return ConfigError(
            f"{called} gave {given}",
            f"one number, or one an example [{self.n_examples}]",
            "Reduce positions and vocabulary inside the metric, such as logits[:, -1, right] - logits[:, -1, wrong].",
        )

    def _stacked(self, values: list[Tensor]) -> Tensor:
        return torch.stack([value.reshape(-1) for value in values])
