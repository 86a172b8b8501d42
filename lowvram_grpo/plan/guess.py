"""Peaks of many settings from the prediction of one: which of them are worth a prediction of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram_grpo.plan.prediction import Prediction
    from lowvram_grpo.plan.speed import Choice, Speed

# Bytes that a layer keeps for its backward pass without recomputation, for each number that its linear layers read or
# write a token: 3.2 to 3.4 were predicted for Qwen2.5. A first guess, corrected by the first prediction.
_KEPT = 3.3
# Bytes a number, with the scales.
_BYTES = {"none": 2.0, "dense": 2.0, "int8": 1.031, "nf4": 0.516}
# Parts of a phase that grow with what is computed at once.
_MOVING = ("activations", "KV cache", "recurrent states", "workspace", "fragmentation")


class Guess:
    """Peaks of choices from one prediction and what is known of the sizes of things; no model is run for it."""

    def __init__(self, speed: Speed, start: Choice, found: Prediction):
        self.speed, self.start, self.found = speed, start, found
        self._off = {True: 1.0, False: 1.0}  # how far guesses were off, with and without recomputation

    def peak(self, choice: Choice) -> float:
        fixed, moving = self._parts(choice)
        return max(fixed[name] + self._off[choice.gradient_checkpointing] * moving[name] for name in fixed)

    def learn(self, choice: Choice, after: Prediction) -> None:
        fixed, moving = self._parts(choice)
        name = after.peak_phase
        if moving[name] > 0:
            self._off[choice.gradient_checkpointing] = max(0.1, (after.phases[name] - fixed[name]) / moving[name])

    def _parts(self, choice: Choice) -> tuple[dict[str, float], dict[str, float]]:
        """(what stays, what moves) by phase."""
        start, shape, work = self.start, self.speed.shape, self.speed.work
        more = shape.weights * (_BYTES[choice.quantization] - _BYTES[start.quantization])
        more += shape.table * (_BYTES[choice.head_dtype] - _BYTES[start.head_dtype])
        if start.embedding_offload and not choice.embedding_offload and not shape.tied:
            more += 2 * shape.table
        tokens = lambda c: self.speed.tokens(min(c.per_device_train_batch_size, work.completions), work.completion)
        cached = lambda c: c.rollout_batch_size * work.completion + -(-c.rollout_batch_size // work.group) * work.prompt
        read = sum((n + k) * count for (n, k), count in shape.linears.items())
        fixed, moving = {}, {}
        for name, size in self.found.phases.items():
            parts = self.found.parts.get(name, {})
            moves = sum(parts.get(part, 0) for part in _MOVING)
            fixed[name], moving[name] = size - moves + more, float(moves)
            if name == "rollout":
                moving[name] *= cached(choice) / cached(start)
            elif name in ("score", "forward", "backward"):
                moving[name] *= tokens(choice) / tokens(start)
                if start.gradient_checkpointing and not choice.gradient_checkpointing and name != "score":
                    moving[name] = max(moving[name], _KEPT * read * tokens(choice))
            if name not in ("load", "optimizer", "reward"):
                moving[name] += max(0, choice.workspace_mib - start.workspace_mib) * 2**20
        return fixed, moving
