"""One wave of completions: a prefill a prompt, then a token a row and step, all on the device.

Nothing here looks at a tensor's values, so that a step also runs on meta tensors (for a memory plan) and the host can
run ahead of the GPU. The exceptions are not ours: transformers' mask code reads the mask of a wave whose prompts differ
in length, and a `HostEmbedding` the ids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowvram_grpo.policy.head import head_of
from lowvram_grpo.rollout.sampler import Sampler, Sampling
from lowvram_grpo.scoring import position_ids


class Wave:
    """The B rows of a wave between two tokens; its KV cache lives until `close`.

    Args:
        causal_lm: Hugging Face model, in eval mode.
        ids: (P, L) left-padded ids of the prompts.
        mask: (P, L), or None where all prompts have the same length.
        owner: (B,) int64, the prompt of each row.
        keys: (B,) int64 keys of the rows' random streams.
        on_cache: called with the cache whenever it has grown.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        sampling: Sampling,
        ids: Tensor,
        mask: Tensor | None,
        owner: Tensor,
        keys: Tensor,
        *,
        workspace_mib: int,
        on_cache: Callable[[DynamicCache], None] | None = None,
    ):
        self.decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        self.head, self.workspace_mib, self.on_cache = head_of(causal_lm), workspace_mib, on_cache
        self.cache = DynamicCache(config=causal_lm.config)
        self.step_index, self.width = 0, ids.shape[1]
        positions = torch.arange(self.width, device=ids.device)[None] if mask is None else position_ids(mask)
        try:
            if self.width > 1:
                cut = lambda x: None if x is None else x[:, :-1]
                self._forward(ids[:, :-1], cut(mask), positions[:, :-1].expand(len(ids), -1))
                self.cache.reorder_cache(owner)
                self._grown()
        except BaseException:
            self.close()
            raise
        own = ids if mask is None else torch.where(mask.bool(), ids, ids[:, -1:])
        self.sampler = Sampler(sampling, keys, own[owner], self.head.shape[0])
        self.tokens = ids[owner, -1]
        self.next_position = positions[:, -1:].expand(len(ids), -1)[owner]
        self.mask = None
        if mask is not None:
            self.mask = torch.cat([mask[owner], mask.new_ones(len(owner), sampling.max_new_tokens)], 1)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """(B, H) hidden states of the last column."""
        if mask is not None and mask.is_meta:  # transformers cannot look into it; this is what it would make of it
            mask = torch.empty(len(mask), 1, ids.shape[1], mask.shape[1], dtype=torch.bool, device="meta")
        out = self.decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        self._grown()
        return out.last_hidden_state[:, -1]

    def _grown(self) -> None:
        if self.on_cache is not None:
            self.on_cache(self.cache)

    def step(self) -> tuple[Tensor, Tensor]:
        """Feed the last token of each row and draw the next: (B,) ids and (B,) float32 log-probs."""
        t = self.step_index
        mask = None if self.mask is None else self.mask[:, : self.width + t]
        hidden = self._forward(self.tokens[:, None], mask, self.next_position + t)
        self.tokens, logps = self.sampler(self.head.logits(hidden, self.workspace_mib), t)
        self.step_index = t + 1
        return self.tokens, logps

    def skip(self, tokens: int) -> None:
        """Go on as if so many tokens had been drawn, with a blank KV cache of the size that it would have then. For
        rehearsals."""
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is None:
                continue
            length = layer.keys.shape[2] + tokens
            if getattr(layer, "is_sliding", False):
                length = min(length, layer.sliding_window - 1)
                layer.cumulative_length += tokens
            blank = lambda x, n=length: x.new_zeros(x.shape[0], x.shape[1], n, x.shape[3])
            layer.keys, layer.values = blank(layer.keys), blank(layer.values)
        self._grown()
        self.step_index += tokens

    def close(self) -> None:
        """Free the KV cache, also where the frames of an error still hold the object."""
        self.cache.layers.clear()


def decode(wave: Wave, sampling: Sampling, look_every: int | None = None) -> tuple[list[list[int]], Tensor]:
    """Draw until every row has ended, or max_new_tokens: ids, ragged behind the end, and log-probs (B, T) on the host.

    Rows that have ended go on with the others, and what they still draw means nothing. The host asks every
    `look_every` steps whether all have.
    """
    rows, device = len(wave.tokens), wave.tokens.device
    ids = torch.empty(rows, sampling.max_new_tokens, dtype=torch.long, device=device)
    logps = torch.empty(rows, sampling.max_new_tokens, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    # Asking a GPU makes the host wait for it, and its queue run dry; a CPU has none.
    every = look_every or (1 if device.type == "cpu" else 8)
    length = 0
    while length < sampling.max_new_tokens:
        ids[:, length], logps[:, length] = wave.step()
        ended |= (wave.tokens[:, None] == wave.sampler.ends).any(1)
        length += 1
        if length % every == 0 and bool(ended.all()):
            break
    return ids[:, :length].tolist(), logps[:, :length].cpu()
