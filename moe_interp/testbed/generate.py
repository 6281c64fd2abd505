"""Answers of a testbed model: scores of items' answers, and free generation in large batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moe_interp.engine.eval_mode import eval_mode
from moe_interp.tokenization import bos_first


def _left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    n_samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch: int = 512,
    seed: int = 0,
) -> list[list[str]]:
    """Completions of each prompt (after ``<bos>``), up to ``<eos>``. ``temperature`` 0 is greedy.

    Returns:
        ``[prompt][sample]`` texts without the prompt.
    """
    bos = tokenizer.bos_token_id
    encoded = [bos_first(bos, tokenizer(p, add_special_tokens=False).input_ids) for p in prompts]
    rows = sorted((i for i in range(len(prompts)) for _ in range(n_samples)), key=lambda i: len(encoded[i]))
    generator = torch.Generator(device=model.device).manual_seed(seed)
    done: list[list[str]] = [[] for _ in prompts]
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        with eval_mode(model):
            new = _continue(model, [encoded[i] for i in chunk], tokenizer, max_new_tokens, temperature, generator)
        for i, text in zip(chunk, tokenizer.batch_decode(new, skip_special_tokens=True)):
            done[i].append(text)
    return done


def _continue(
    model: PreTrainedModel,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """New ids ``[row, new]`` with padding after ``<eos>``; cached keys, one position a step."""
    ids, mask = (t.to(model.device) for t in _left_padded(prompts, tokenizer.pad_token_id))
    open_rows = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    cache, feed, new = None, ids, []
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -feed.shape[1] :]
        out = model(
            feed, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        token = torch.where(open_rows, token, tokenizer.pad_token_id)
        new.append(token)
        open_rows &= token != tokenizer.eos_token_id
        if not open_rows.any():
            break
        feed, mask = token[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(new, dim=1)
