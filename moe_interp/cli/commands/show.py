"""``moe-interp show``: the routing of a prompt at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_interp.cli import console, options
from moe_interp.cli.options import Device, DeviceMap, Dtype, Layers, Model
from moe_interp.errors import ConfigError


def show_routing(
    model: Model,
    text: Annotated[str | None, typer.Argument(help="The prompt.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids in its place, such as 12,7,99.")] = None,
    layers: Layers = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Show weights also where several layers are shown.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for a page to open in a browser, and a table.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Which expert each token of a prompt is sent to at each MoE layer, as a coloured table.

    One layer alone is shown with all experts of each token and their weights.
    """
    options.check_common(model, device, dtype, 0, out)
    options.check_device_map(device_map, device)
    names, ids = options.layer_names(layers), options.token_ids(tokens)
    if (text is None) == (ids is None):
        given = "no prompt" if text is None else "both a text and --tokens"
        raise ConfigError(
            given, "a text, or --tokens 12,7,99", f'Example: moe-interp show --model {options.DEMO} "1+1="'
        )

    from moe_interp.cli.load import load_hooks
    from moe_interp.experiments.show_routing import show
    from moe_interp.report import write_page

    moe = load_hooks(model, device, dtype, device_map)
    layer: Any = names[0] if names is not None and len(names) == 1 else names
    view = show(moe, text if ids is None else ids, layer, weights=weights or None)
    console.out.print(view)
    if out is not None:
        write_page(out / "routing.csv", view.to_dataframe().to_csv(index=False))
        console.point_to(write_page(out / "index.html", view.html()))
