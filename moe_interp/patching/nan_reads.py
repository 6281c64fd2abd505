"""Whether a function reads NaN without its result showing it, as a comparison or an argmax does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# what gives some of the values, or none of them
_SELECTING = frozenset(
    [
        "__getitem__",
        "gather",
        "index_select",
        "select",
        "narrow",
        "take",
        "take_along_dim",
        "unbind",
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "masked_select",
        "masked_fill",
        "where",
        "diagonal",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "new_tensor",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
    ]
)
# what gives values away from torch, or may leave NaN out of only some of its results
_HIDING = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "__array__",
        "__dlpack__",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__complex__",
        "__contains__",
        "__format__",
        "__repr__",
        "equal",
        "allclose",
        "nan_to_num",
        "nansum",
        "nanmean",
        "nanmedian",
        "nanquantile",
        "fmax",
        "fmin",
    ]
)


class NaNReads(TorchFunctionMode):
    """Inside the ``with``, notes whether an operation on a tensor with NaN gives what may hide it.

    Arithmetic carries NaN on; comparisons, argmax, ranks and casts to whole numbers do not, nor do ``item`` and
    ``numpy``. A metric such as an accuracy can be the same for NaN as for other logits, and still read them.

    Attributes:
        is_hidden: Whether there was one.
    """

    is_hidden = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reads = not self.is_hidden and _any_nan(_tensors((args, kwargs or {})))
        found = func(*args, **(kwargs or {}))
        if reads:
            name, results = getattr(func, "__name__", ""), _tensors(found)
            is_whole = any(not (value.is_floating_point() or value.is_complex()) for value in results)
            is_gone = bool(results) and name not in _SELECTING and not _any_nan(results)
            self.is_hidden = name in _HIDING or is_whole or is_gone
        return found


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _any_nan(values: list[Tensor]) -> bool:
    return any(value.is_floating_point() and bool(value.isnan().any()) for value in values)
