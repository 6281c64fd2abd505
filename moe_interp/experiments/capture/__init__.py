"""Recording the routing of an attached model."""
