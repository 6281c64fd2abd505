"""What an MoE layer of each family is: modules, routing rule, experts. Knows transformers modules, no hooks."""
