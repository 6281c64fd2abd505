"""What an MoE layer of each family is: its modules, its routing rule, its experts. Knows transformers modules, no hooks."""
