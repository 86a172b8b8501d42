"""The device's side of a rollout: prefills, then a token a row and step.

Nothing in a step looks at a tensor's values, so that it runs on meta tensors (for a memory plan), can be captured in a
CUDA graph, and lets the host run ahead. A step feeds the last token of each row, the prompt's own at first, so rows of
any age go through one and the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.kernels.decode.kv import Rows
from lowvram_grpo.kernels.decode.logits import linear_logits
from lowvram_grpo.memory.host import upload
from lowvram_grpo.policy.attention import forward_with_layout
from lowvram_grpo.policy.embeddings import host_inputs
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.weight_stream import stream_of
from lowvram_grpo.policy.xformers_attention import Kernel
from lowvram_grpo.rollout.appending import Appended, AppendLayout, packs_of
from lowvram_grpo.rollout.attention import DecodeLayout, PrefillLayout
from lowvram_grpo.rollout.cache import GroupCache
from lowvram_grpo.rollout.graphs import StepGraphs
from lowvram_grpo.rollout.noise import stream_key
from lowvram_grpo.rollout.sampler import Sampler, Sampling
from lowvram_grpo.rollout.schedule import Scheduler

# So many tokens of prompts, or behind rows, go through the decoder together: they fill a GPU, and take little memory
# beside the cache.
PREFILL_TOKENS = 1024


@dataclass(frozen=True)
class DecodeSettings:
    """How a rollout is computed, apart from what is sampled.

    Attributes:
        workspace_mib: for tiles of a quantized head.
        kv_dtype: of the cache, see `GroupCache`.
        graphs: capture steps in CUDA graphs.
        attention_path: of the decode attention, see `decode_attention`.
        fused_sampler: see `Sampler`.
        fused_head: see `linear_logits`.
        prefill_kernel: see `PrefillLayout`.
    """

    workspace_mib: int = 64
    kv_dtype: str = "auto"
    graphs: bool = False
    attention_path: str | None = None
    fused_sampler: bool = False
    fused_head: bool = False
    prefill_kernel: Kernel | None = None


class _RowTable(NamedTuple):
    """int64 (R,) views of one upload: what the host knows of each row.

    `slot`, `rank` and `age` are those of the decode attention's `Rows`, `output` is the row of `Decoder.ids` that the
    request writes to, and `key` that of its random stream.
    """

    slot: Tensor
    rank: Tensor
    age: Tensor
    output: Tensor
    key: Tensor


class Decoder:
    """Decodes what a `Scheduler` admits.

    Args:
        causal_lm: Hugging Face model in eval mode, its attention set to ours.
        prompts: token ids.
        group: completions of each.
        seed: of the random streams.

    Attributes:
        ids, logps: (prompts * G + 1, T) int64 and float32; completion g of prompt p is row p * G + g, ragged behind its
            end. The last row takes what rows write that nobody waits for.
        tokens: (R,) int64, the last token of each row.
        computed: tokens that went through the model, those of rows that nobody waits for left out.
        continues: rows may go on by `insert`, so a row's states must stay where its turn ended, however much later the
            host looks. To be set before the first step.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        sampling: Sampling,
        scheduler: Scheduler,
        prompts: list[list[int]],
        group: int,
        *,
        seed: int,
        device: torch.device,
        settings: DecodeSettings,
    ):
        self.decoder, self.head = getattr(causal_lm, causal_lm.base_model_prefix), head_of(causal_lm)
        self.sampling, self.scheduler, self.prompts, self.group = sampling, scheduler, prompts, group
        self.seed, self.device, self.settings = seed, device, settings
        if not all(prompts):
            raise UserError(
                "A prompt has no tokens; give every prompt at least one, its beginning-of-text for example."
            )
        rows, slots, length = scheduler.rows, scheduler.slots, sampling.max_new_tokens
        self.cache = GroupCache(slots, max(map(len, prompts)) - 1, rows, length, settings.kv_dtype)
        self.sampler = Sampler(sampling, rows, self.head.shape[0], device, fused=settings.fused_sampler)
        completions = len(prompts) * group
        self.ids = torch.zeros(completions + 1, length, dtype=torch.long, device=device)
        self.logps = torch.zeros(completions + 1, length, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._table = torch.zeros(len(_RowTable._fields), rows, dtype=torch.long, device=device)
        self._prefix = torch.zeros(slots, dtype=torch.long, device=device)
        self._members = torch.full((slots, min(group, rows)), -1, dtype=torch.long, device=device)
        self._ages: list[int] = []
        self._regular, self._most_members, self.computed = False, 0, 0
        self._look_up = host_inputs(causal_lm)
        self._inputs: dict[str, Tensor] = {}
        self._weights = stream_of(causal_lm)
        self.continues, self._skipped = False, False
        # A graph takes no copies from memory that is not page-locked.
        graphs = settings.graphs and (self._weights is None or self._weights.locked)
        self._graphs = StepGraphs(self._forward, rows, enabled=graphs, put_back=self._put_states_back)

    # Between steps: the host moves rows and prompts about

    def admit(self, finished: Iterable[int] = ()) -> None:
        """Free the rows that have finished; admit the requests that come next, and prefill their prompts."""
        update = self.scheduler.admit(finished)
        for source, target in update.row_moves:
            self.cache.move_row(source, target, self._ages[source])
            self.sampler.move(source, target)
            self.tokens[target] = self.tokens[source]
            self._ages[target] = self._ages[source]
        for source, target in update.slot_moves:
            self.cache.move_slot(source, target)
        self._ages = (self._ages + [0] * len(update.admitted))[: len(self.scheduler.running)]
        packs = self._packs(update.prefills)
        if self.device.type == "meta":
            packs = packs[:1]  # the first stands for all: none is larger
        prompts = {row: self.prompts[self.scheduler.running[row].prompt] for row in update.admitted}
        for row in prompts:
            self._ages[row] = 0
        ids = [[i for _, prompt in pack for i in self._prefilled(prompt)] for pack in packs]
        for pack, found in zip(packs, self._upload(prompts, ids)):
            self.prefill(pack, found[None])
        self._begin_states(sorted(prompts))

    def _begin_states(self, rows: Iterable[int]) -> None:
        """Put rows' states behind all but the last tokens of their prompts."""
        prompts = [(row, self.scheduler.running[row].prompt) for row in rows]
        held = {prompt: slot for slot, prompt in enumerate(self.scheduler.held)}
        self.cache.states.begin([(row, held[p] if len(self.prompts[p]) > 1 else None) for row, p in prompts])

    def _put_states_back(self) -> None:
        """To where they were before a step that failed on its way, which may be the first alone: that is when an
        operation that waits is found."""
        if self.cache.states.nbytes and any(self._ages) and not self._skipped:
            raise RuntimeError("a decode step failed half-way, and states of its layers have gone on")
        self._begin_states(range(len(self.scheduler.running)))

    def insert(self, behind: Mapping[int, tuple[list[int], list[int]]]) -> None:
        """Put tokens behind those of rows that go on: what the rows have cached is kept, and the rest goes through the
        model once.

        Args:
            behind: of each row, what it has said up to now (what it has drawn since is dropped), one token at least,
                and what follows. Both together are less than a whole completion.
        """
        pieces, places, seen = [], [], {}
        for row, (said, more) in behind.items():
            prompt = self.scheduler.running[row].prompt
            self._ages[row] = len(said) + len(more)
            seen[row] = [*self.prompts[prompt], *said, *more]
            places += [(self.output(row), len(said) + i, token) for i, token in enumerate(more)]
            if more:
                # Its steps fed the prompt's last token and all it has said but for the last of it.
                slot, before = self.scheduler.held.index(prompt), len(self.prompts[prompt]) - 1
                pieces.append((Appended(row, slot, before, len(said), len(more)), [said[-1], *more[:-1]]))
        packs = packs_of(pieces, PREFILL_TOKENS)
        if self.device.type == "meta":
            packs = packs[:1]
        ids = [[i for _, part in pack for i in part] for pack in packs]
        outputs, positions, inserted, *ids = self._upload(seen, [*(zip(*places) if places else ((), (), ())), *ids])
        self.ids[outputs, positions], self.logps[outputs, positions] = inserted, self.logps.new_zeros(len(inserted))
        for pack, found in zip(packs, ids):
            layout = AppendLayout(self.cache, [piece for piece, _ in pack])
            forward_with_layout(self.decoder, layout, layout.positions(self.device), input_ids=found[None])
            self.computed += len(found)

    def _packs(self, prefills: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """(slot, prompt) pairs that go through the decoder together."""
        packs, tokens = [], PREFILL_TOKENS
        for slot, prompt in prefills:
            length = len(self._prefilled(prompt))
            if not length:
                continue
            if tokens + length > PREFILL_TOKENS:
                packs.append([])
                tokens = 0
            packs[-1].append((slot, prompt))
            tokens += length
        return packs

    def _prefilled(self, prompt: int) -> list[int]:
        """All but the last token, which the first step feeds; a prompt of one token is only looked at by a cache that
        wants to know the size of its keys."""
        ids = self.prompts[prompt]
        return ids[:-1] or (ids if self.settings.kv_dtype == "int8" else [])

    def prefill(self, pack: list[tuple[int, int]], ids: Tensor) -> None:
        """Write all but the last token of these prompts, `ids` (1, L) one after another, to the cache."""
        prompts = [self._prefilled(prompt) for _, prompt in pack]
        slots, kernel = [slot for slot, _ in pack], self.settings.prefill_kernel
        layout = PrefillLayout(self.cache, [len(p) for p in prompts], slots, kernel)
        forward_with_layout(self.decoder, layout, layout.positions(self.device), input_ids=ids)
        self.computed += ids.shape[1]

    def output(self, row: int) -> int:
        """The row of `ids` and `logps` that a live row writes to."""
        prompt, g = self.scheduler.running[row]
        return prompt * self.group + g

    def _upload(self, began: Mapping[int, Sequence[int]], more: Sequence[Sequence[int]] = ()) -> list[Tensor]:
        """Tell the device which request each row decodes, and what the rows feed that begin or go on in another way
        than by what they drew: the last of all ids that such a row has seen, its prompt's first. `more` are further
        numbers, which come back as int64 tensors. One copy that nobody waits for."""
        running, members = self.scheduler.running, self.scheduler.members()
        rows = self._table.shape[1]
        table = [[0, -1, 0, len(self.ids) - 1, 0]] * rows  # what nobody waits for, where no request is
        for slot, group in enumerate(members):
            for rank, row in enumerate(group):
                key = stream_key(self.seed, *running[row])
                table[row] = [slot, rank, self._ages[row], self.output(row), key]
        slots, width = self._members.shape
        idle = slots - len(members)
        before = [len(self.prompts[p]) - 1 for p in self.scheduler.held] + [0] * idle
        ranked = [m + [-1] * (width - len(m)) for m in members] + [[-1] * width] * idle
        fed = [began[row][-1] if row in began else -1 for row in range(rows)]
        seen = [(row, i) for row, ids in began.items() for i in ids] if self.sampler.penalizes else []
        parts = [list(zip(*table)), before, ranked, fed, [row for row, _ in seen], [i for _, i in seen], *more]
        parts = upload([torch.tensor(part, dtype=torch.long, device="cpu") for part in parts], self.device)
        for kept, part in zip((self._table, self._prefix, self._members), parts):
            kept.copy_(part)
        self.tokens.copy_(torch.where(parts[3] >= 0, parts[3], self.tokens))
        self.sampler.admit(list(began), *parts[4:6])
        self.finished.zero_()
        self._most_members = max(map(len, members), default=0)
        in_order = [row for group in members for row in group]
        self._regular = in_order == list(range(len(members) * self._most_members))
        return parts[6:]

    # A step: the device alone

    @property
    def captures(self) -> bool:
        """Whether steps become CUDA graphs."""
        return self._graphs.enabled

    def step(self) -> None:
        """Feed the last token of each row and draw the next."""
        width = self._graphs.width(len(self.scheduler.running), self.sampling.max_new_tokens - min(self._ages))
        if self._look_up is not None:
            for name, found in self._look_up(self.tokens[:width, None]).items():
                if name not in self._inputs:
                    self._inputs[name] = found.new_empty(len(self.tokens), *found.shape[1:])
                self._inputs[name][:width] = found
        self._run(width)
        self.computed += len(self._ages)
        self._ages = [age + 1 for age in self._ages]

    def _run(self, width: int) -> None:
        """A step. Where it may be a graph and weights are streamed, their copies are part of it: the graph brings each
        layer into its slot and ends, as it begins, with the first two layers there."""
        if self._weights is None or not self.captures:
            self._graphs(width)
            return
        self._weights.settle()
        try:
            self._graphs(width)
        except BaseException:
            self._weights.forget()
            raise

    def _forward(self, width: int) -> None:
        rows = _RowTable(*self._table[:, :width])
        # What is drawn behind a turn's end is dropped, and a state cannot be cut back.
        frozen = self.finished[:width] if self.continues else None
        layout = DecodeLayout(self.cache, self._attention_rows(rows), self.settings.attention_path, frozen)
        positions = (self._prefix[rows.slot] + rows.age)[:, None]
        inputs = {"input_ids": self.tokens[:width, None]}
        if self._look_up is not None:
            inputs = {name: kept[:width] for name, kept in self._inputs.items()}
        hidden = forward_with_layout(self.decoder, layout, positions, **inputs)[:, -1]
        self._graphs.enabled &= layout.fixed
        logits = linear_logits(
            hidden, self.head, workspace_mib=self.settings.workspace_mib, fused=self.settings.fused_head
        )
        drawn, logps = self.sampler(logits, rows.key, rows.age)
        self.tokens[:width] = drawn
        self.ids[rows.output, rows.age], self.logps[rows.output, rows.age] = drawn, logps
        self.finished[:width] |= (drawn[:, None] == self.sampler.ends).any(1)
        rows.age.add_(1)
        if self._weights is not None and self.captures:
            self._weights.settle()

    def _attention_rows(self, rows: _RowTable) -> Rows:
        fixed = {"slot": rows.slot, "age": rows.age, "rank": rows.rank}
        if self._graphs.enabled:  # sizes that hold for every step
            longest = {"longest_prefix": self.cache.prompt_length, "longest_own": self.cache.completion_length}
            return Rows(**fixed, prefix=self._prefix, members=self._members, **longest)
        live = len(self.scheduler.held)
        before = {len(self.prompts[p]) - 1 for p in self.scheduler.held}
        return Rows(
            **fixed,
            prefix=self._prefix[:live],
            members=self._members[:live, : self._most_members].contiguous(),
            longest_prefix=max(before),
            longest_own=max(self._ages) + 1,
            even=len(before) == 1 and len(set(self._ages)) == 1,
            regular=self._regular,
        )

    def steps_left(self) -> int:
        """Until a row has as many tokens as it may have."""
        return self.sampling.max_new_tokens - max(self._ages)

    def finished_rows(self) -> list[int]:
        """The rows whose requests have finished. Waits for the device."""
        full = self.sampling.max_new_tokens
        return [row for row, (end, age) in enumerate(zip(self.finished.tolist(), self._ages)) if end or age == full]

    def drawn(self, rows: Sequence[int]) -> list[list[int]]:
        """What each of these rows has said, as far as steps went: maybe beyond an end. Waits for the device."""
        found = torch.stack([self.ids[self.output(row)] for row in rows]).tolist()
        return [ids[: self._ages[row]] for row, ids in zip(rows, found)]

    def skip(self, tokens: int) -> None:
        """Go on as if so many tokens had been drawn in each row. For rehearsals."""
        self._ages, self._skipped = [age + tokens for age in self._ages], True
        self._upload({})

    def rehearse_insert(self) -> None:
        """The memory of the largest `insert`: as many tokens as go through the model together, behind rows that are
        full by then. Rows are as old as before."""
        length = self.sampling.max_new_tokens
        more = min(length - 2, PREFILL_TOKENS)
        if more < 1:
            return
        rows, ages = min(len(self._ages), -(-PREFILL_TOKENS // more)), self._ages
        self._ages = list(ages)
        self.insert({row: ([0] * (length - 1 - more), [0] * more) for row in range(rows)})
        self._ages = ages
        self._upload({})

    def close(self) -> None:
        """Free the cache and the graphs that point to it."""
        self._graphs.close()
        self.cache.close()


def run(
    decoder: Decoder, look_every: int | None = None, ended: Callable[[list[int]], list[int]] = lambda rows: rows
) -> None:
    """Decode until every request has finished.

    `ended` is given the rows that drew an end token or are full, and says which of them have finished; the others it
    has given something to go on with (`Decoder.insert`).

    The host looks every `look_every` steps which rows have, or when one is full: asking a GPU makes the host wait and
    the GPU's queue run dry; a CPU has none.
    """
    every = look_every or (1 if decoder.device.type == "cpu" else 8)
    decoder.admit()
    while not decoder.scheduler.done:
        for _ in range(min(every, decoder.steps_left())):
            decoder.step()
        rows = decoder.finished_rows()
        finished = ended(rows) if rows else rows
        if finished:
            decoder.admit(finished)
