"""One step of decode attention as an engine would have it, on any device, its oracle, and what may differ."""

from __future__ import annotations

from dataclasses import replace

import torch
from lowvram_grpo.kernels.decode.attention import decode_attention
from lowvram_grpo.kernels.decode.kv import KV, Rows, quantize_kv
from lowvram_grpo.kernels.runtime import interpreted

DEVICE = "cpu" if interpreted() or not torch.cuda.is_available() else "cuda"


def assert_no_worse(found, dtype=torch.float32):
    kernel, eager = found
    atol = 4e-6 if dtype == torch.float32 else 1e-4
    # Triton's interpreter cuts float32 to bfloat16 where a GPU rounds.
    slack = 2.0**-8 if dtype == torch.bfloat16 and interpreted() else 0.0
    assert kernel <= 2 * eager + atol + slack, found


RAGGED = {"counts": [3, 0, 1, 2], "prefixes": [37, 4, 0, 1], "ages": [0, 33, 17, 5, 1, 16]}


class Problem:
    """One step of `counts[s]` rows of prompt slot s, shuffled, and `dead` rows that nobody waits for.

    Slots and rows behind the live ones are there too, as in an engine's buffers.
    """

    def __init__(
        self, counts, prefixes, ages, *, rep=3, kv_heads=2, d=40, dtype=torch.float32, int8=False, dead=0, longest=None,
        longest_own=None, scale=None, seed=0,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g)
        r, slots = sum(counts) + dead, len(counts)
        order = torch.randperm(r, generator=g)
        slot = torch.zeros(r, dtype=torch.long)
        rank = torch.full((r,), -1)
        members = torch.full((slots, max(counts) + 1), -1)
        place = 0
        for s, count in enumerate(counts):
            for i in range(count):
                members[s, i] = row = order[place]
                slot[row], rank[row] = s, i
                place += 1
        age = torch.tensor([ages[i % len(ages)] for i in range(r)])
        self.rows = Rows(slot, age, torch.tensor(prefixes), members, rank, max(prefixes), int(age.max()) + 1)
        self.live = rank >= 0
        heads = kv_heads * rep
        self.query, self.key, self.value = (draw(r, n, d).to(dtype) for n in (heads, kv_heads, kv_heads))
        length = (longest or max(prefixes) + 2, longest_own or int(age.max()) + 3)
        self.prompts, self.own = (
            self._cache(draw(n, kv_heads, t, d), draw(n, kv_heads, t, d), dtype, int8)
            for n, t in ((slots + 1, length[0]), (r + 1, length[1]))
        )
        self.scale = d**-0.5 * 2 if scale is None else scale

    @staticmethod
    def _cache(keys, values, dtype, int8) -> KV:
        if not int8:
            return KV(keys.to(dtype), values.to(dtype))
        (keys, key_scales), (values, value_scales) = quantize_kv(keys), quantize_kv(values)
        return KV(keys, values, key_scales, value_scales)

    def poisoned(self, cache: KV, used: torch.Tensor) -> KV:
        """NaN (int8: NaN scales) behind the first used[n] tokens of slot n and in all later slots."""
        lengths = torch.zeros(len(cache.keys), dtype=torch.long)
        lengths[: len(used)] = used
        unused = torch.arange(cache.keys.shape[2]) >= lengths[:, None, None]
        if cache.quantized:
            scales = (x.masked_fill(unused, torch.nan) for x in (cache.key_scales, cache.value_scales))
            return KV(cache.keys.clone(), cache.values.clone(), *scales)
        return KV(*(x.masked_fill(unused[..., None], torch.nan) for x in (cache.keys, cache.values)))

    def run(self, path, rows=None, poison=False, **masks):
        """(output, own cache afterwards)."""
        prompts, own = self.prompts, self.own
        if poison:
            prompts, own = self.poisoned(prompts, self.rows.prefix), self.poisoned(own, self.rows.age)
        to = lambda x: None if x is None else x.to(DEVICE)
        own = KV(*(None if x is None else x.clone().to(DEVICE) for x in own))
        rows = rows or self.rows
        names = ("slot", "age", "prefix", "members", "rank")
        rows = replace(rows, **{n: to(getattr(rows, n)) for n in names}, _masks={})
        out = decode_attention(
            to(self.query), to(self.key), to(self.value), KV(*map(to, prompts)), own, rows, scale=self.scale,
            path=path, **masks,
        )  # fmt: skip
        return out.cpu(), KV(*(None if x is None else x.cpu() for x in own))

    def exact(self, own: KV, window=None, softcap=None, sinks=None) -> torch.Tensor:
        """float64, row by row, from the appended cache."""

        def dense(cache, n, length):
            pairs = ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
            return [x[n, :, :length].double() * (1 if s is None else s[n, :, :length, None].double()) for x, s in pairs]

        rows, out = self.rows, torch.zeros(self.query.shape, dtype=torch.float64)
        for r in range(len(self.query)):
            before = int(rows.prefix[rows.slot[r]]) if rows.rank[r] >= 0 else 0
            shared = dense(self.prompts, rows.slot[r], before)
            keys, values = (torch.cat(x, 1) for x in zip(shared, dense(own, r, rows.age[r] + 1)))
            query = self.query[r].double().view(len(keys), -1, keys.shape[2])
            scores = query @ keys.transpose(1, 2) * self.scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if window:
                scores[..., : max(0, keys.shape[1] - window)] = -torch.inf
            if sinks is not None:
                scores = torch.cat([scores, sinks.cpu().double().view(*scores.shape[:2], 1)], -1)
            out[r] = (scores.softmax(-1)[..., : keys.shape[1]] @ values).reshape(out[r].shape)
        return out

    def errors(self, **masks):
        """Largest errors of live rows, kernel's and PyTorch's; the kernel reads a poisoned cache."""
        eager, own = self.run("torch", **masks)
        found, appended = self.run("triton", poison=True, **masks)
        exact = self.exact(own, **masks)
        worst = lambda x: (x.double() - exact)[self.live].abs().max().item()
        written = torch.arange(len(self.rows.age)), slice(None), self.rows.age
        for a, b in zip(own, appended):
            assert a is None or torch.equal(a[written], b[written])
        assert found.dtype == self.query.dtype and found.isfinite().all()
        return worst(found), worst(eager)
