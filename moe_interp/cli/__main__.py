"""``python -m moe_interp.cli``: the same as ``moe-interp``."""

from moe_interp.cli.main import app

app()
