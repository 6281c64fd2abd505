"""The result of router tuning: its history, what was learned, and the change of the weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from moe_interp.experiments.router_tuning import tables
from moe_interp.experiments.router_tuning.data import check_tuning
from moe_interp.experiments.router_tuning.delta import RouterDelta
from moe_interp.experiments.router_tuning.summary import headlines, summary_text
from moe_interp.hooks.attach import MoEHooks
from moe_interp.results import Result


class RouterTuningResult(Result, kind="router_tuning"):
    """A router's change by tuning, and what it did to tokens that it was not tuned on.

    ``data`` (also ``history``) holds by ``step`` the loss, learning rate, gradient's norm and number of tokens with a
    better route; by ``evaluation`` and held-out ``token`` the cross-entropy ``ce`` in nats and what its routes are
    (``changed``, ``preference``, ``adoption``, ``overlap``, ``entropy``, by layer), the ``load`` of the experts and
    ``weight_change``; and the weights ``original[layer, expert, d_model]`` with their ``delta``. The first evaluation
    is of the untuned model.
    """

    main = "ce"
    version = 1

    check = staticmethod(check_tuning)

    @property
    def history(self) -> xr.Dataset:
        """The run's dataset."""
        return self.data

    @property
    def delta(self) -> dict[str, Tensor]:
        """By parameter name, what is added to the weight ``[expert, d_model]``; as safetensors takes it."""
        return dict(self.router_delta.delta)

    @property
    def router_delta(self) -> RouterDelta:
        """The change with the untuned weights, and the fingerprint of the model that it belongs to."""
        names = self.data.attrs["parameters"]
        dtype = getattr(torch, self.data.attrs["dtype"])
        original, delta = (torch.from_numpy(self.data[name].values.copy()) for name in ("original", "delta"))
        return RouterDelta(
            {name: original[at].to(dtype) for at, name in enumerate(names)},
            {name: delta[at].clone() for at, name in enumerate(names)},
            self.data.attrs["fingerprint"],
            asdict(self.manifest),
        )

    def apply(self, moe: MoEHooks) -> None:
        """Put the tuned router into the model: :meth:`.delta.RouterDelta.apply`."""
        self.router_delta.apply(moe)

    def revert(self, moe: MoEHooks) -> None:
        """Put the untuned router back, bit for bit: :meth:`.delta.RouterDelta.revert`."""
        self.router_delta.revert(moe)

    def merge(self, checkpoint: str | Path, out: str | Path | None = None) -> Path:
        """Put the tuned router into a saved transformers checkpoint: :meth:`.delta.RouterDelta.merge`."""
        return self.router_delta.merge(checkpoint, out)

    def save_delta(self, path: str | Path) -> Path:
        """Write the change as safetensors: :meth:`.delta.RouterDelta.save`."""
        return self.router_delta.save(path)

    def held_out(self) -> pd.DataFrame:
        """What was learned, by domain and confidence: :func:`.tables.held_out`."""
        return self.cached(tables.held_out)

    def curve(self) -> pd.DataFrame:
        """The same over training: :func:`.tables.curve`."""
        return self.cached(tables.curve)

    def headlines(self) -> list[str]:
        """What was tuned, and what came of it: cross-entropy, routes, harm; a sentence or two each."""
        return headlines(self)

    def summary(self) -> str:
        """The run in plain words; it says where preference rose without adoption."""
        return summary_text(self)

    def __repr__(self) -> str:
        return super().summary()
