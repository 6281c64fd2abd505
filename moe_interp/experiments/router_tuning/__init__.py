"""Router-only tuning: whether the routers of a frozen model can be taught to take better routes."""
