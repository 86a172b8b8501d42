"""Conversations in the engine: a row whose turn has ended is handed over, and goes on behind what comes back.

Its keys and values stay where they are. The reply's tokens go through the model once, attending to them (see
`appending.py`), and the row draws on from there; a row is given to the next request when its conversation is over.
Whatever is drawn is a function of (seed, prompt, completion, position in the completion), so it depends on nobody
else's turns.
"""

from __future__ import annotations

from lowvram_grpo.errors import UserError
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.rollout.decode import Decoder
from lowvram_grpo.rollout.turns import Reply, Turn


class Conversations:
    """What has been said in each completion of a rollout.

    Args:
        reply: answers turns, see `turns.py`.
    """

    def __init__(self, decoder: Decoder, reply: Reply):
        self.decoder, self.reply = decoder, reply
        decoder.continues = True
        count = len(decoder.prompts) * decoder.group
        self._ids: list[list[int]] = [[] for _ in range(count)]
        self._mask: list[list[int]] = [[] for _ in range(count)]
        self._truncated = [False] * count

    def ended(self, rows: list[int]) -> list[int]:
        """Hand over the turns of these rows of the decoder: which of their conversations are over. The others go on.
        Waits for the device."""
        decoder = self.decoder
        places = sorted((decoder.output(row), row) for row in rows)
        turns = [self._turn(output, drawn) for (output, _), drawn in zip(places, decoder.drawn([r for _, r in places]))]
        replies = self.reply(turns)
        if len(replies) != len(turns):
            raise UserError(
                f"{len(turns)} turns have ended, and {len(replies)} replies came back; return one for each, a list of "
                "token ids or None."
            )
        over, behind = [], {}
        for (output, row), turn, more in zip(places, turns, replies):
            # Without room for another token of the model's there is no point in a reply, nor is it cut.
            fits = more is not None and len(turn.ids) + len(more) < decoder.sampling.max_new_tokens
            if not fits:
                self._truncated[output] = more is not None or not turn.ended
                over.append(row)
                continue
            self._check(more, turn)
            behind[row] = turn.ids, list(more)
            self._ids[output] += more
            self._mask[output] += [0] * len(more)
        if behind:
            decoder.insert(behind)
        return over

    def _turn(self, output: int, drawn: list[int]) -> Turn:
        """`drawn`: all of the completion as the device has it; it may have gone on behind an end."""
        ids, ends = self._ids[output], set(self.decoder.sampling.eos_ids)
        sampled = drawn[len(ids) :]
        end = next((i for i, token in enumerate(sampled) if token in ends), None)
        if end is not None:
            sampled = sampled[: end + 1]
        ids += sampled
        self._mask[output] += [1] * len(sampled)
        return Turn(output, list(ids), sampled, end is not None)

    def _check(self, more: list[int], turn: Turn) -> None:
        known = self.decoder.head.shape[0]
        unknown = next((token for token in more if not 0 <= token < known), None)
        if unknown is not None:
            raise UserError(
                f"The reply in conversation {turn.row} has the token {unknown}, and the model knows 0 to "
                f"{known - 1}; render replies by the model's own tokenizer."
            )

    def batch(self) -> RolloutBatch:
        """All of it, once every conversation is over."""
        decoder = self.decoder
        logps = [row[: len(ids)] for row, ids in zip(decoder.logps[:-1].cpu(), self._ids)]
        prompts = [prompt for prompt in decoder.prompts for _ in range(decoder.group)]
        return RolloutBatch(prompts, self._ids, logps, self._truncated, self._mask)
