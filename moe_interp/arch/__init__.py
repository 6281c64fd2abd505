"""What an MoE layer of each family is: modules, routing rule, experts. Knows transformers modules, no hooks.

A new family is a row of the table in ``families.py``; ``family.py`` says what the columns mean. Where it does something
that no family did, one more file changes: how it chooses and weighs experts in ``rules.py``, what its router returns in
``router_outputs.py``, how it stores its experts in ``expert_functions.py``; and where its block calls the experts in a
way of its own, ``moe_interp/hooks/blocks.py``. TransformerLens' own hooks of it are listed in
``moe_interp/hooks/transformer_lens_hooks.py``.
"""
