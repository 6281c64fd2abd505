"""The raw logits of a router that does not return them: captured while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_interp.arch.modules import native_part
from moe_interp.errors import HookError

_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.addmm)


class CapturedLogits(TorchFunctionMode):
    """Inside the ``with``, captures the output of the router's linear map: the one that gives a logit an expert.

    Its module's output, where the router has one (quantised, or with an adapter around it); else the product itself.

    Args:
        router: The router.
        n_experts: How many logits there are.
    """

    def __init__(self, router: nn.Module, n_experts: int) -> None:
        super().__init__()
        self._router, self._n_experts = router, n_experts
        self._of_modules: list[Tensor] = []
        self._products: list[Tensor] = []
        self._stack = ExitStack()

    @property
    def logits(self) -> Tensor:
        """``[*token, expert]``.

        Raises:
            HookError: no linear map of that width ran.
        """
        captured = self._of_modules or self._products
        if not captured:
            raise HookError(
                f"a router of the class {type(self._router).__name__} in which no linear map with "
                f"{self._n_experts} outputs was seen",
                "a router that makes a logit an expert",
                "Merge adapters into its weights, or load the router unquantised.",
            )
        return captured[-1]

    def __enter__(self) -> CapturedLogits:
        for module in native_part(self._router).children():
            self._stack.callback(module.register_forward_hook(self._keep).remove)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and self._is_wide(out):
            self._products.append(out)
        return out

    def _keep(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._is_wide(out):
            self._of_modules.append(out)

    def _is_wide(self, out: Any) -> bool:
        return isinstance(out, Tensor) and out.ndim > 1 and out.shape[-1] == self._n_experts
