"""Everything that is measured of the package on a GPU, by one command, at real shapes with random weights.

    python benchmarks/gpu.py [--models olmoe,qwen3_30b,gpt_oss_20b,dsv2_lite] [--seconds 240] [--device cuda]

In this order: exactness in float32 and the rate of a large matrix product; of each model the plain forward pass, what
hooks cost, how often the host waits, naive routes, branches, isolation, memory; a whole experiment on OLMoE's shape;
steps of the testbed's ``paper`` preset. Markdown tables come last. bfloat16 on a GPU, one model at a time.

``--seconds`` is a limit (imports not counted), of which each model gets a share. A part that the time left does not
hold, judged by what was measured before it, is skipped, and a line says so; what still runs at the limit is stopped.
The tables have all their rows always. ``--models tiny``, and any model on a machine without a GPU, runs the same at
tiny sizes on the CPU in float32: that shows that it works, not how fast it is. Where a part fails or is not exact, the
rest goes on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import math
import sys

from gpu_shapes import SHAPES, shapes_of


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES), help=f"among {', '.join(SHAPES)}; or tiny")
    parser.add_argument("--seconds", type=float, default=240.0, help="the limit")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, but for tiny, by default")
    given = parser.parse_args(arguments)
    try:
        given.names = shapes_of(given.models)
    except ValueError as error:
        parser.error(str(error))
    if not (math.isfinite(given.seconds) and given.seconds >= 1):
        parser.error(f"--seconds {given.seconds:g}: give at least 1")
    given.tiny = given.models.strip() == "tiny"
    return given


def main(arguments: list[str] | None = None) -> int:
    given = options(arguments)
    from gpu_session import Session, device_of  # torch takes seconds to import: mistakes are answered before

    device = device_of(given.device, tiny=given.tiny)
    if device is None:
        print("gpu.py: error: --device cuda, but torch finds no GPU here: leave it out", file=sys.stderr)
        return 2
    session = Session(given.names, given.seconds, device, tiny=given.tiny or device.type == "cpu")
    seconds = session.run()
    print(f"\nmeasured in {seconds:.1f} s of {given.seconds:g}\n\n{session.tables()}", flush=True)
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
