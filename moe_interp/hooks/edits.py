"""What counts as an edit of an activation, and how it is noticed without waiting for the device.

A hook edits an activation where it returns other values, or writes into the tensor it is given and returns None. Every
tensor counts the writes to it (``Tensor._version``), through its views, ``detach()``, ``out=`` and kernels of torch as
well. Where the count has not moved and the hook handed back the same memory, nothing was written. Only where something
may have been written are values compared, and writing the values that are there is no edit.

Some writes are not counted: those through ``.data``, ``numpy()``, DLPack, a raw pointer or a storage. They are edits
all the same: where a hook asks a tensor for one of these, the activation is compared by value. What a hook writes after
it has returned, through a tensor that it kept, is no edit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# what gives access to a tensor's memory past its count of writes
_UNCOUNTED = frozenset(
    {
        Tensor.data.__get__,  # type: ignore[attr-defined]
        Tensor.data.__set__,  # type: ignore[attr-defined]
        Tensor.numpy,
        Tensor.__array__,
        Tensor.data_ptr,
        Tensor.untyped_storage,
        Tensor.storage,
        Tensor.__dlpack__,
        Tensor.__dlpack_device__,
        Tensor.__cuda_array_interface__.__get__,  # type: ignore[attr-defined]
        Tensor.apply_,
        Tensor.map_,
    }
)


class VersionedTensor:
    """A tensor that was handed to other code, and how often it had been written to until then.

    Attributes:
        tensor: The tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._version = _version(tensor)

    def is_unchanged(self, result: Tensor) -> bool:
        """Whether ``result`` is the tensor, or its memory in the same shape, and no write to it was counted.

        A tensor made in inference mode counts no writes: there it is enough that it is the same.
        """
        return _version(self.tensor) == self._version and (result is self.tensor or _is_alias(result, self.tensor))


class EditDetector(TorchFunctionMode):
    """Inside the ``with``, hooks have a tensor, and accesses to memory that pass by its count are noticed.

    Args:
        tensor: What they are given.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._handed = VersionedTensor(tensor)
        self._is_certain = not tensor.is_inference()

    def is_unedited(self, result: Tensor) -> bool:
        """Whether it is certain, without a look at any value, that the hooks changed nothing."""
        return self._is_certain and self._handed.is_unchanged(result)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # in inference mode, a view as another dtype has a count of its own
        if func in _UNCOUNTED or (func is Tensor.view and isinstance([*args, *kwargs.values()][-1], torch.dtype)):
            self._is_certain = False
        return func(*args, **kwargs)


def counting_copy(value: Tensor) -> Tensor:
    """A copy that counts writes, in inference mode too."""
    if not torch.is_inference_mode_enabled():
        return value.clone()
    with torch.inference_mode(False), torch.no_grad():
        return value.clone()


def is_edited(after: Tensor, before: Tensor) -> bool:
    """Whether two activations differ, by value: the host waits for the device, unless it is the same tensor."""
    return after is not before and not (after.shape == before.shape and torch.equal(after, before))


def carries_gradient(value: Tensor) -> bool:
    return torch.is_grad_enabled() and value.requires_grad


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_alias(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory: a view, or what torch makes of a hooked tensor."""
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.layout == b.layout
    try:
        return alike and a.stride() == b.stride() and a.data_ptr() == b.data_ptr() and a.is_neg() == b.is_neg()
    except RuntimeError:  # no memory of its own: sparse, or inside of a transform of torch.func
        return False
