"""Which experts two sets of prompts differ in, and what steering them does."""
