"""The entropy of the mean prediction of some of a token's routes, and the null route of full passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_interp.engine.recorded_pass import record_pass
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.force import set_routes
from moe_interp.routes import RouteScores, check_routes, score_from_base, score_joint_routes
from moe_interp.routes.predictions import averaged_log_probs
from tests import tiny
from tests.integration.routes.helpers import attached, largest_difference, padded_batch, precision, random_routes


def scored(moe: MoEHooks, layer: int, n_routes: int, method: str, **options: object) -> tuple[RouteScores, Tensor]:
    """Scores of random routes, of which about half are averaged; one token has none of these, some are absent."""
    tokens, mask = padded_batch()
    base = record_pass(moe, tokens, [layer], mask)
    routes = random_routes(moe, layer, tokens, n_routes)
    routes[1, 4, 0] = -1
    averaged = torch.rand(routes.shape[:3], generator=torch.Generator().manual_seed(1)) < 0.5
    averaged[0, 4] = False
    wanted = base.is_real & base.is_real.roll(-1, dims=1)
    wanted[:, -1] = False
    if method == "naive":
        wanted[:, :4] = wanted[:, 5:] = False
    given = {layer: check_routes(base, layer, routes)}
    return score_from_base(base, given, wanted, None, method, averaged=averaged, **options), averaged  # type: ignore[arg-type]


# the unembedding last or not (granite_moe scales the logits), shared keys or copies of them
@pytest.mark.parametrize("name", ["olmoe", "granite_moe"])
def test_branches_and_full_passes_give_one_entropy(name: str) -> None:
    moe = attached(name, torch.float64)
    with precision(torch.float64):
        for layer in (moe.layers[0], moe.layers[-1]):
            assert isinstance(layer, int)
            (branches, _), (naive, _) = (scored(moe, layer, 3, m) for m in ("branch", "naive"))
            assert branches.mean_entropy is not None
            assert naive.mean_entropy is not None
            asked = ~naive.logp_null.isnan()
            assert int(asked.sum()) == 3
            difference = (branches.mean_entropy - naive.mean_entropy)[asked]
            assert float(difference.abs().nan_to_num().max()) <= 1e-9
            assert bool(naive.mean_entropy[0, 4].isnan())
            assert torch.equal(naive.mean_entropy.isnan()[asked], branches.mean_entropy.isnan()[asked])
            assert float((branches.logp - naive.logp)[asked].abs().nan_to_num().max()) <= 1e-9


def test_the_entropy_is_that_of_the_mean_of_hooked_predictions() -> None:
    moe = attached("olmoe")
    tokens = tiny.random_tokens(1, 7)
    base, routes = record_pass(moe, tokens, [1]), random_routes(moe, 1, tokens, 4)
    averaged = torch.zeros(1, 7, 4, dtype=torch.bool)
    averaged[0, 3, [0, 2, 3]] = True
    found = score_from_base(base, {1: check_routes(base, 1, routes)}, [3], averaged=averaged).mean_entropy
    mean = torch.zeros(base.logits.shape[-1])
    for route in (0, 2, 3):
        hooks = set_routes(moe, 1, routes[0, 3, route], None, [3])
        with torch.no_grad():
            mean += moe.bridge.run_with_hooks(tokens, fwd_hooks=hooks)[0, 3].softmax(-1) / 3
    assert found is not None
    assert float(found[0, 3]) == pytest.approx(-float((mean * mean.log()).sum()), abs=1e-5)
    assert int((~found.isnan()).sum()) == 1


@pytest.mark.parametrize("name", ["olmoe", "granite_moe"])
def test_what_is_averaged_changes_no_score_and_a_small_budget_no_entropy(name: str) -> None:
    moe = attached(name)
    for layer, n_routes in ((0, 12), (2, 60)):  # at the last layer many routes are unembedded by their span
        whole, _ = scored(moe, layer, n_routes, "branch")
        tokens, mask = padded_batch()
        routes = random_routes(moe, layer, tokens, n_routes)
        routes[1, 4, 0] = -1
        plain = score_joint_routes(moe, tokens, {layer: routes}, attention_mask=mask)
        assert largest_difference(whole.logp, plain.logp) <= 2e-5
        assert plain.mean_entropy is None
        small, _ = scored(moe, layer, n_routes, "branch", memory_budget=2**21)
        assert whole.mean_entropy is not None
        assert small.mean_entropy is not None
        assert largest_difference(whole.mean_entropy, small.mean_entropy) <= 2e-5


def test_predictions_are_averaged_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, 50, generator=generator)
    averaged = torch.rand(3, 40, generator=generator) < 0.4
    averaged[0, :16], averaged[1] = True, False
    targets = torch.randint(50, (3, 2), generator=generator)
    scores, entropy = averaged_log_probs(logits, targets, averaged)
    log = logits.double().log_softmax(-1)
    torch.testing.assert_close(scores.double(), log.gather(-1, targets[:, None].expand(-1, 40, -1)), rtol=0, atol=1e-5)
    for token in (0, 2):
        mean = log[token, averaged[token]].exp().mean(0)
        assert float(entropy[token]) == pytest.approx(-float((mean * mean.log()).sum()), abs=1e-5)
    assert bool(entropy[1].isnan())


def test_the_null_route_of_full_passes_is_a_pass_of_its_own() -> None:
    moe = attached("olmoe")
    tokens = tiny.random_tokens(1, 7)
    seen: list[int] = []

    def sharpen(module: object, args: object, logits: Tensor) -> Tensor:
        seen.append(1)
        return logits * (1 + 1e-3 * len(seen))  # noise of the machinery: no two passes are the same

    handle = moe.bridge.original_model.get_output_embeddings().register_forward_hook(sharpen)
    try:
        found = score_joint_routes(moe, tokens, {1: random_routes(moe, 1, tokens)}, [3], method="naive")
    finally:
        handle.remove()
    assert len(seen) == 1 + 1 + 2  # the plain forward, the null route, two routes
    assert 1e-5 < found.null_distance < 0.1
