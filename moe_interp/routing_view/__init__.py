"""How the routing of one prompt is shown: in a notebook, in a terminal, as a table."""

from moe_interp.routing_view.panel import Panel
from moe_interp.routing_view.view import RoutingView

__all__ = ["Panel", "RoutingView"]
