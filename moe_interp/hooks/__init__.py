"""Making a layer patchable: the hook points, and the two places where a forward pass is opened for them."""
