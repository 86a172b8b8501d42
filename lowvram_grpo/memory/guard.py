"""When memory runs out in the middle of a run: give back what nobody needs, take the next rung, do the same work again.

The work of each phase is a function that starts from the same state whenever it is called: its rollout has seeds of its
own, its gradients begin at zero, its weights are those from before. So a step that ran out of memory ends as if it had
never begun, and the next attempt gives the same gradient to rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from lowvram_grpo.errors import UserError, is_out_of_memory
from lowvram_grpo.memory.budget import budget
from lowvram_grpo.memory.devices import detect
from lowvram_grpo.memory.ladder import Rung, next_rung

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig

T = TypeVar("T")


class Event(NamedTuple):
    """Memory ran out in `phase`, and `rung` was taken."""

    phase: str
    rung: Rung


def release() -> None:
    """Give memory that nobody uses back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cap(args: GRPOConfig) -> None:
    """Hold PyTorch's allocator to what of the card is ours: beyond it allocations fail, before a driver pages to host
    memory or a desktop starves. Nothing to do without CUDA."""
    if args.device.type != "cuda":
        return
    device = detect(args.device.index or 0)
    allowed = budget(device, args.vram_gib).allocator_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / device.total_bytes), args.device)


class Guard:
    """Runs the phases of a step under the ladder.

    Args:
        settings: what the rungs change now, by name.
        apply: sets one of them, `apply(key, value)`.
        ladder: the preset's rungs, those below the starting point first.
        tell: receives one sentence for people at each rung, and the event.
        limits: describes the longest work there is ("prompts of 256 tokens, ..."), for errors.
        active: whether to climb; without, running out of memory ends the run with a sentence.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        apply: Callable[[str, Any], None],
        *,
        ladder: Sequence[Rung] = (),
        tell: Callable[[str, Event], None],
        limits: str,
        active: bool = True,
    ):
        self.settings, self.apply, self.ladder, self.tell = settings, apply, tuple(ladder), tell
        self.limits, self.active = limits, active
        self.events: list[Event] = []
        self.refused: list[str] = []
        #: Entered around each phase: a ledger's, or one that reads the device's own counters.
        self.watch: Callable[[str], AbstractContextManager] | None = None
        self._phase = "load"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is being done: an error inside belongs to the innermost phase."""
        outer, self._phase = self._phase, name
        with self.watch(name) if self.watch else nullcontext():
            yield
        # Not in a finally: whoever catches the error asks which phase it came from.
        self._phase = outer

    def run(self, phase: str, work: Callable[[], T], undo: Callable[[], None] | None = None) -> T:
        """The result of `work`, which is called again after each rung; `undo` brings back the state it starts from.

        Raises:
            UserError: memory ran out, and there is no rung left that relieves the phase.
        """
        outer = self._phase
        while True:
            try:
                with self.phase(phase):
                    done = work()
                if phase == "rollout" and self.active:
                    release()  # the cache's odd sizes are of no use to the training passes
                return done
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed, asked = self._phase, _asked(error)
            finally:
                self._phase = outer
            # Only here, outside of the except block, are the frames of the failed attempt gone, and with them whatever
            # tensors they held.
            if undo is not None:
                undo()
            release()
            self._climb(failed, asked)

    def _climb(self, phase: str, asked: str) -> None:
        rung = self._taken(phase) if self.active else None
        if rung is None:
            raise UserError(
                f"Out of GPU memory in the {phase} phase ({asked}), with {self.limits}"
                f"{', and no memory saver is left to take' if self.active else ''}; lower max_completion_length, "
                "max_prompt_length or num_generations, take a smaller model (`lowvram-grpo plan` says which fits), or "
                "close what else uses the GPU."
            )
        self.events.append(Event(phase, rung))
        sentence = f"out of GPU memory in the {phase} phase ({asked}): {rung.words} from now on ({rung})."
        self.tell(sentence, self.events[-1])

    def _taken(self, phase: str) -> Rung | None:
        """The next rung that this model has, taken."""
        while rung := next_rung(phase, self.settings, self.ladder):
            self.settings[rung.key] = rung.value
            try:
                self.apply(rung.key, rung.value)
            except UserError as error:  # MLPs that cannot be tiled, say
                self.refused.append(f"{rung}: {error}")
                continue
            return rung
        return None


def _asked(error: BaseException) -> str:
    """What was asked for, from PyTorch's message."""
    parts = str(error).split(". ")
    tried = [part for part in parts if part.startswith("Tried to allocate")]
    return (tried or parts)[0].rstrip(".").replace("Tried to allocate", "tried to allocate")
