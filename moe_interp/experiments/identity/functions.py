"""A checksum of what a function does: its code, and everything that it holds on to."""

from __future__ import annotations

import dis
import functools
import hashlib
import logging
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_interp.experiments.identity.tensors import tensor_digest

MOST_PARTS = 20_000
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, Enum, PurePath, slice, range, type(Ellipsis))
# they hold no numbers
SILENT = (torch.device, types.ModuleType, logging.Logger, weakref.ref, type(threading.Lock()), type(threading.RLock()))
LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "transformers", "transformer_lens", "accelerate", "moe_interp"}
# of what they are, not of what they hold: the model's own parts count elsewhere
STRUCTURE = (
    "moe_interp.hooks",
    "moe_interp.arch",
    "moe_interp.engine",
    "transformer_lens",
    "transformers",
    "accelerate",
    "logging",
)


class UnknownContentError(Exception):
    """A value whose content cannot be told."""


class Fingerprint:
    """Checksums of values, with the parts of a model counted by their names.

    Args:
        names: ``id`` -> name of objects that count by name alone.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self.seen: dict[int, str] = {}
        self.kept: list[Any] = []  # so that no id is used twice

    def of(self, value: Any) -> str:
        """SHA-256 over a value and everything it refers to.

        Raises:
            UnknownContentError: it holds something whose content cannot be read, or too much.
        """
        if isinstance(value, PLAIN) or value is NotImplemented:
            return _sha(type(value).__qualname__, repr(value))
        if id(value) in self.names:
            return _sha("part", self.names[id(value)])
        if id(value) in self.seen:
            return self.seen[id(value)]
        if len(self.seen) >= MOST_PARTS:
            raise UnknownContentError(f"more than {MOST_PARTS} values")
        self.seen[id(value)] = "a value within itself"
        self.kept.append(value)
        self.seen[id(value)] = self._numbers(value) or self._function(value) or self._object(value)
        return self.seen[id(value)]

    def _numbers(self, value: Any) -> str | None:
        if isinstance(value, Tensor):
            return _sha("tensor", tensor_digest(value))
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return _sha("array", str(value.shape), *map(self.of, value.ravel().tolist()))
        if isinstance(value, np.ndarray | np.generic):
            return _sha("array", str(value.dtype), str(value.shape), value.tobytes().hex())
        if isinstance(value, torch.Generator):
            return _sha("generator", tensor_digest(value.get_state()))
        if isinstance(value, np.random.Generator):
            return _sha("generator", self.of(value.bit_generator.state))
        if isinstance(value, Mapping):
            return _sha("mapping", *sorted(_sha(self.of(k), self.of(v)) for k, v in value.items()))
        if isinstance(value, set | frozenset):
            return _sha("set", *sorted(map(self.of, value)))
        if isinstance(value, list | tuple):
            return _sha(type(value).__qualname__, *map(self.of, value))
        return None

    def _function(self, value: Any) -> str | None:
        if isinstance(value, functools.partial):
            return _sha("partial", self.of(value.func), self.of(value.args), self.of(value.keywords))
        if isinstance(value, types.MethodType):
            return _sha("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, types.BuiltinFunctionType | type):
            return _sha("name", str(value.__module__), value.__qualname__)
        if isinstance(value, types.FunctionType):
            parts = [str(value.__module__), value.__code__.co_qualname]
            parts += [self.of(held) for held in (value.__defaults__, value.__kwdefaults__)]
            parts += [self.of(cell.cell_contents) for cell in value.__closure__ or () if not _is_empty(cell)]
            if _root(value.__module__) not in LIBRARIES:
                parts += [*_code(value.__code__)]
                parts += [self.of(value.__globals__[name]) for name in _globals_read(value)]
            return _sha("function", *parts)
        return None

    def _object(self, value: Any) -> str:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, SILENT) or kind.startswith(STRUCTURE):
            return _sha("object", kind, str(getattr(value, "name", "")) if kind.startswith("transformer_lens") else "")
        if isinstance(value, nn.Module):
            tensors = [*value.named_parameters(), *value.named_buffers()]
            return _sha("module", kind, *(f"{name} {tensor_digest(tensor)}" for name, tensor in tensors))
        held = dict(getattr(value, "__dict__", {}))
        for owner in type(value).__mro__:
            slots = owner.__dict__.get("__slots__", ())
            for name in [slots] if isinstance(slots, str) else slots:
                if not name.startswith("__") and hasattr(value, name):
                    held[name] = getattr(value, name)
        if not held and not hasattr(value, "__dict__"):
            raise UnknownContentError(f"a {kind}")
        written = [cls for cls in type(value).__mro__ if _root(cls.__module__) not in {*LIBRARIES, "builtins"}]
        methods = [f for cls in written for f in vars(cls).values() if isinstance(f, types.FunctionType)]
        return _sha("object", kind, self.of(held), *map(self.of, methods))


def _sha(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _root(module: str | None) -> str:
    return (module or "").split(".")[0]


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is Ellipsis
    except ValueError:
        return True


def _code(code: types.CodeType) -> Iterable[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        elif isinstance(constant, frozenset):  # its order is another in every process
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _globals_read(function: types.FunctionType) -> list[str]:
    """Names of the module's values that a function, or one within it, reads."""
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        names |= {str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return sorted(names & function.__globals__.keys())
