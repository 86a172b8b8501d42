"""Host syncs, copies and launches of a GRPO step, counted on the mask and held by baseline.txt.

    python -m tests.masked_cuda.baseline            # what differs from the file
    python -m tests.masked_cuda.baseline --write    # the file anew; reasons of lines that are still there are kept

Counted are the last decode step outside of a graph, look, forward pass, backward pass and optimizer step, and the
fullest refill, of a run of two steps: nf4 base with LoRA on all linear layers, int8 head, 8-bit AdamW, bfloat16,
checkpointed activations, played on 8.6. Launches a layer are the difference of a model of 3 layers and one of 2; syncs
and copies are those of 2 layers. A launch is an operator that starts work, or a Triton kernel: a lower bound of what
CUDA starts, as some of PyTorch's operators are several kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("baseline.txt")
HEAD = """\
# What a GRPO step asks of host and device, counted on the mask (tests/masked_cuda/baseline.py says what is run).
# phase | count | what | module:function that asked (library function) | why it is there
#
#   python -m tests.masked_cuda.baseline --write
#
# writes this file anew. A count may only fall; one that rises needs its reason here.
#
# with {versions}
"""
# Phases of which launches are counted: the others are host work, or several things that vary.
_EVERY_KERNEL = "decode step, fused_ops on"
_LAUNCHING = ("decode step", _EVERY_KERNEL, "micro-batch, forward", "micro-batch, backward", "optimizer step")
_A_LAYER = "launches a layer"
# Their operators are counted too, so that another version may have others.
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class Line(NamedTuple):
    phase: str
    what: str
    where: str


def counts() -> dict[Line, int]:
    """Counted now."""
    two, three = _run(2), _run(3)
    # What only a card can judge, and `auto` leaves: products of sibling layers in one launch.
    for run, layers in ((two, 2), (three, 3)):
        run[_EVERY_KERNEL] = _run(layers, fused_ops="on", max_steps=1, max_completion_length=2)["decode step"]
    found: Counter[Line] = Counter()
    for phase, (syncs, copies, launches) in two.items():
        if phase in _LAUNCHING:
            a_layer = three[phase].launches - launches
            found[Line(phase, _A_LAYER, "")] = a_layer
            found[Line(phase, "launches beside the layers", "")] = launches - 2 * a_layer
        for event in syncs:
            found[Line(phase, event.what, event.where)] += 1
        for event in copies:
            if "non-blocking" in event.what:  # the others stand among the syncs
                found[Line(phase, event.what, event.where)] += 1
    return dict(found)


class Phase(NamedTuple):
    syncs: list[Any]
    copies: list[Any]
    launches: int


def _run(layers: int, **settings: Any) -> dict[str, Phase]:
    """What each phase did the last time."""
    import pytest

    from lowvram_grpo.memory.optimizer import GuardedStep
    from lowvram_grpo.rollout.decode import Decoder
    from lowvram_grpo.rollout.graphs import StepGraphs
    from lowvram_grpo.training.trainer import GRPOTrainer
    from tests.masked_cuda.record import RECORD
    from tests.masked_cuda.scenarios import trained

    found: dict[str, Phase] = {}

    latest = lambda before, now: True
    # One that admits a request and prefills a prompt.
    fullest = lambda before, now: before is None or len(now.syncs) >= len(before.syncs)

    def watched(phase, function, counted=latest):
        def call(*args, **kwargs):
            outer = RECORD.syncs, RECORD.copies, RECORD.launches
            RECORD.syncs, RECORD.copies, RECORD.launches = [], [], Counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside = Phase(RECORD.syncs, RECORD.copies, sum(RECORD.launches.values()))
                if counted(found.get(phase), inside):
                    found[phase] = inside
                RECORD.syncs, RECORD.copies, RECORD.launches = outer

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, phase, counted in (
            (StepGraphs, "_warm_up", "decode step", latest),
            (Decoder, "finished_rows", "look", latest),
            (Decoder, "admit", "refill", fullest),
            (GRPOTrainer, "compute_loss", "micro-batch, forward", latest),
            (GuardedStep, "__call__", "optimizer step", latest),
            (GRPOTrainer, "_gradients", "update, beside its micro-batches", latest),
            (GRPOTrainer, "training_step", "step, beside rollout and update", latest),
            (GRPOTrainer, "collect", "rollout, beside steps, looks and refills", latest),
        ):
            patch.setattr(owner, name, watched(phase, getattr(owner, name), counted))
        # Or what is watched here would be taken for a subclass's.
        patch.setattr(GRPOTrainer, "own_loss", False)

        def before(trainer):
            accelerator = trainer.accelerator
            accelerator.backward = watched("micro-batch, backward", accelerator.backward)

        settings = {"max_steps": 2, "max_completion_length": 12, **settings}
        trained(
            dtype="bf16", quantization="nf4", head_dtype="int8", optim="adamw_8bit", gradient_checkpointing=True,
            model={"num_hidden_layers": layers}, before=before, rollout_batch_size=3,
            memory_probe="off", self_test=False, signal_check=False, **settings,
        )  # fmt: skip
    return found


def versions() -> str:
    """Of the libraries whose operators are counted, without what follows the second point."""
    return ", ".join(f"{name} {'.'.join(version(name).split('.')[:2])}" for name in _LIBRARIES)


def comparable(line: Line) -> bool:
    """Whether a count of the file holds for the libraries that are here: what they ask for is theirs to change."""
    return f"# with {versions()}\n" in FILE.read_text(encoding="utf-8") or bool(line.where and "(" not in line.where)


def read() -> tuple[dict[Line, int], dict[Line, str]]:
    """(counts, reasons) of the file."""
    known, why = {}, {}
    for text in FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []:
        if text.strip() and not text.startswith("#"):
            phase, count, what, where, reason = (part.strip() for part in text.split("|"))
            known[Line(phase, what, where)], why[Line(phase, what, where)] = int(count), reason
    return known, why


def write(found: dict[Line, int]) -> None:
    _, why = read()
    moved = {(line.phase, line.what, line.where.rpartition(":")[2]): text for line, text in why.items()}

    def reason(line: Line) -> str:  # of a function that went to another module, too
        return why.get(line) or moved.get((line.phase, line.what, line.where.rpartition(":")[2]), "")

    phases = list(dict.fromkeys(line.phase for line in found))
    text = HEAD.format(versions=versions())
    for phase in phases:
        lines = [line for line in found if line.phase == phase]
        text += "\n"
        for line in sorted(lines, key=lambda line: ("launches" not in line.what, line)):
            row = (line.phase, str(found[line]), line.what, line.where, reason(line))
            text += " | ".join(row).rstrip() + "\n"
    FILE.write_text(text, encoding="utf-8")


def difference(found: dict[Line, int], known: dict[Line, int]) -> list[str]:
    """One sentence for each count that is not the file's."""
    said = []
    for line in dict.fromkeys([*known, *found]):
        now, before = found.get(line, 0), known.get(line, 0)
        if now != before:
            place = f" at {line.where}" if line.where else ""
            verdict = "more than before" if now > before else "fewer: lower the baseline"
            said.append(f"{line.phase}: {line.what}{place}: {now}, baseline {before} ({verdict})")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = counts()
    said = difference(found, read()[0])
    print("\n".join(said) or "as in the baseline")
    if args.write:
        write(found)
    sys.exit(bool(said) and not args.write)


if __name__ == "__main__":
    import tests.masked_cuda.plugin  # noqa: F401  puts the mask on, before torch

    main()
