"""Counterfactual routes: whether another choice of experts would have predicted the next token better."""
