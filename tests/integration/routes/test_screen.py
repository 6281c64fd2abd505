"""First-order screening: credits are derivatives of exact scores, and what passes is scored exactly."""

from __future__ import annotations

import pytest
import torch

from moe_interp.engine.recorded_pass import RecordedPass, record_pass
from moe_interp.errors import ConfigError
from moe_interp.routes import LayerRoutes, check_routes, own_gradients, route_credits, score_routes, screen_routes
from tests.integration.routes.helpers import attached, padded_batch, precision, random_routes, served_layers


def scorable_tokens(base: RecordedPass) -> torch.Tensor:
    wanted = torch.zeros_like(base.is_real)
    wanted[:, :-1] = base.is_real[:, :-1] & base.is_real[:, 1:]
    return wanted


# a plain decoder, sinks and sliding windows, latent attention with shared experts, a scaled residual, joined norms
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v2", "granite_moe", "gemma4_text"])
def test_credits_are_the_derivatives_of_naive_scores(name: str) -> None:
    moe, (tokens, mask) = attached(name, torch.float64), padded_batch()
    layer = moe.layers[0]
    assert isinstance(layer, int)
    with precision(torch.float64):
        base = record_pass(moe, tokens, [layer], mask)
        wanted = scorable_tokens(base)
        indices, weights = base.indices[layer].unsqueeze(2), base.weights[layer].unsqueeze(2)
        step = 1e-4 * torch.randn(weights.shape, dtype=weights.dtype, generator=torch.Generator().manual_seed(1))
        up, down = (
            score_routes(moe, tokens, layer, indices, [0, 4, -2], w, mask, method="naive")
            for w in (weights + step, weights - step)
        )
        credit = route_credits(base, {layer: LayerRoutes(indices, weights + step, True)}, wanted)[layer]
    is_compared = up.isfinite()
    assert int(is_compared.sum()) == 9  # three of each sequence
    differences = ((up - down) / 2)[is_compared]
    assert float((credit[is_compared] - differences).abs().max()) < 1e-5 * float(differences.abs().max())
    assert bool(credit[~wanted].isnan().all())


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v2"])
def test_one_backward_pass_serves_all_layers(name: str) -> None:
    moe, (tokens, mask) = attached(name, torch.float64), padded_batch()
    layers = served_layers(name, moe)
    with precision(torch.float64):
        base = record_pass(moe, tokens, layers, mask)
        together = own_gradients(base, layers, scorable_tokens(base))
        for layer in layers:
            alone = own_gradients(base, [layer], scorable_tokens(base))[layer]
            torch.testing.assert_close(together[layer], alone, rtol=1e-9, atol=1e-12)
            assert float(alone.abs().max()) > 1e-4


def test_the_gradient_leaves_later_tokens_out() -> None:
    """The gradient of the sum over all tokens is another one: later predictions read a position's keys and values."""
    moe, (tokens, _) = attached("olmoe", torch.float64), padded_batch()
    layer = 0
    name = moe.bridge.blocks[layer].hook_mlp_out.name
    found: list[torch.Tensor] = []

    def keep(value: torch.Tensor, hook: object) -> torch.Tensor:
        found.append(value.detach().requires_grad_())
        return found[0]

    with precision(torch.float64), torch.enable_grad():
        base = record_pass(moe, tokens, [layer])
        own = own_gradients(base, [layer], scorable_tokens(base))[layer]
        logits = moe.bridge.run_with_hooks(tokens, fwd_hooks=[(name, keep)])
        logp = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
        (mixed,) = torch.autograd.grad(logp.sum(), found, retain_graph=True)
        (of_one,) = torch.autograd.grad(logp[:, 4].sum(), found)
    torch.testing.assert_close(own[:, 4], of_one[:, 4], rtol=1e-9, atol=1e-12)
    assert float((own - mixed)[:, :-2].abs().amax(-1).min()) > 1e-4


def test_what_passes_the_screen_is_scored_exactly_and_the_rest_is_audited() -> None:
    moe, (tokens, mask) = attached("qwen3_moe"), padded_batch()
    layers = moe.layers[:2]
    routes = {layer: random_routes(moe, layer, tokens, n_routes=6) for layer in layers}
    routes[layers[0]][0, 2, 4:] = -1  # absent
    screened = screen_routes(moe, tokens, layers, routes, keep=3, audit=1000, attention_mask=mask)  # type: ignore[arg-type]
    for layer in layers:
        one = screened[layer]  # type: ignore[index]
        exact = score_routes(moe, tokens, layer, routes[layer], attention_mask=mask)
        assert torch.equal(one.logp.isfinite(), one.is_kept)
        torch.testing.assert_close(one.logp[one.is_kept], exact[one.is_kept], rtol=0, atol=2e-5)
        scored = exact.isfinite().any(dim=-1)
        assert bool((one.is_kept.sum(dim=-1)[scored] == 3).all())
        # the best by credit are those kept
        worst_kept = one.credit.masked_fill(~one.is_kept, torch.inf).amin(-1)
        best_left = one.credit.masked_fill(one.is_kept, -torch.inf).nan_to_num(nan=-torch.inf).amax(-1)
        assert bool((worst_kept >= best_left)[scored].all())
        # all tokens were audited
        advantage = (exact - one.logp_standard.unsqueeze(-1)).nan_to_num(nan=-torch.inf)
        best = advantage.argmax(dim=-1, keepdim=True)
        recall = float(one.is_kept.gather(-1, best)[scored].float().mean())
        kept = advantage.masked_fill(~one.is_kept, -torch.inf).amax(-1).clamp(min=0)[scored].sum()
        assert one.audit.n_tokens == int(scored.sum())
        assert one.audit.recall == pytest.approx(recall, abs=1e-6)
        assert one.audit.gain_kept == pytest.approx(float(kept / advantage.amax(-1).clamp(min=0)[scored].sum()), 1e-3)


def test_a_screen_that_keeps_all_misses_nothing_and_a_sample_is_seeded() -> None:
    moe, (tokens, _) = attached("olmoe"), padded_batch()
    routes = {1: random_routes(moe, 1, tokens, n_routes=5)}
    everything = screen_routes(moe, tokens, [1], routes, keep=9, audit=7)[1]
    assert (everything.audit.n_tokens, everything.audit.recall, everything.audit.gain_kept) == (7, 1.0, 1.0)
    one, same, other = (screen_routes(moe, tokens, [1], routes, keep=1, audit=7, seed=s)[1].audit for s in (0, 0, 1))
    assert one.advantage.tolist() == same.advantage.tolist() != other.advantage.tolist()


def test_small_route_differences_are_ranked_without_a_miss() -> None:
    """Where the effects are small the first order is all there is: every best route is kept with keep=1."""
    moe, (tokens, _) = attached("olmoe", torch.float64), padded_batch()
    with precision(torch.float64):
        base = record_pass(moe, tokens, [1])
        indices = base.indices[1].unsqueeze(2).repeat(1, 1, 8, 1)
        noise = torch.randn(indices.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weights = base.weights[1].unsqueeze(2) + 1e-5 * noise
        routes = LayerRoutes(indices, weights, True)
        credit = route_credits(base, {1: routes}, scorable_tokens(base))[1]
        exact = score_routes(moe, tokens, 1, indices, weights=weights)
    scored = exact.isfinite().any(-1)
    assert torch.equal(credit[scored].argmax(-1), exact[scored].argmax(-1))


def test_what_cannot_be_screened_is_refused() -> None:
    moe, (tokens, _) = attached("lfm2_moe"), padded_batch()
    first = next(layer for layer in moe.layers if layer not in served_layers("lfm2_moe", moe))
    assert isinstance(first, int)
    with pytest.raises(ConfigError, match=r"screening from layer .*Screen later layers"):
        screen_routes(moe, tokens, [first], {first: random_routes(moe, first, tokens)})
    moe = attached("olmoe")
    with pytest.raises(ConfigError, match=r"keep=0 and audit=64\. Expected: at least one of each"):
        screen_routes(moe, tokens, [0], {0: random_routes(moe, 0, tokens)}, keep=0)
    with pytest.raises(ConfigError, match=r"layers \[0, 1\], and routes at layers \[0\]"):
        screen_routes(moe, tokens, [0, 1], {0: random_routes(moe, 0, tokens)})
    base = record_pass(moe, tokens, [0])
    assert check_routes(base, 0, random_routes(moe, 0, tokens)).present.all()
