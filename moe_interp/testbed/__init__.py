"""A routing testbed: small MoE models trained on clearly separable domains, beside a router that knows the domains."""
