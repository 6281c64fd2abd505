"""Items whose reliability and correlation are known."""

import numpy as np

from moe_interp.stats import derive_rng, latent_pearson, spearman


def planted(reliability, rho, n=50, layers=32, experts=16, seed=0):
    """Items, and the mean Spearman correlation of their expectations."""
    rng = derive_rng(seed, "planted")
    r = float(latent_pearson(rho, experts))
    a, b = rng.standard_normal((2, layers, experts))
    b = r * a + np.sqrt(1 - r**2) * b
    noise = np.sqrt(n * (1 - reliability) / reliability)
    x, y = (side + noise * rng.standard_normal((n, layers, experts)) for side in (a, b))
    return x, y, float(spearman(a, b).rho.mean())
