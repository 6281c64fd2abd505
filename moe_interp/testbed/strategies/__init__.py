"""Routing strategies: hooks that change the route, and auxiliary losses."""
