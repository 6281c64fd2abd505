"""Ends of sequences whose experts give something else at one layer, through the rest of the model.

What a layer gives at a position changes nothing before it. So a pass with a changed layer l runs layers l+1.. from the
first changed position on, reads the keys and values of earlier positions from the recorded pass, and has the recorded
logits there. This is exact.
"""
