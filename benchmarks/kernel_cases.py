"""What bench_kernels.py measures, in order of worth."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = ("train", "loss", "score", "kl", "dense", "int8", "nf4")


class Case(NamedTuple):
    """One problem: all providers of `op` meet on the same tensors."""

    op: str
    shape: str
    rows: int
    dtype: str
    profile: str

    def worth(self, rows: list[int], dtypes: list[str], shapes: list[str]) -> tuple:
        """Sorts cases, the most telling first: what every step does, on the profile of a trained model."""
        profile = {"real": 0, "peaked": 0, "mixed": 1, "diffuse": 2}[self.profile]
        main = self.op == "train"
        return (
            dtypes.index(self.dtype), rows.index(self.rows), (0 if main else 1) + profile, OPS.index(self.op),
            shapes.index(self.shape),
        )  # fmt: skip


def cases_of(args: argparse.Namespace) -> list[Case]:
    found = []
    shapes, rows, dtypes = args.shapes, args.rows, args.dtypes
    for op in args.ops:
        # The dense product does the same work whatever the rows look like.
        profiles = ["diffuse"] if op == "dense" else args.profiles
        for shape in shapes:
            found += [
                Case(op, shape, n, dtype, profile)
                for n in rows
                for dtype in dtypes
                for profile in (["real"] if args.hidden else profiles)
                if op != "loss"
            ]
    return sorted(found, key=lambda case: case.worth(rows, dtypes, shapes))


def steps(args: argparse.Namespace) -> Iterator[Case | None]:
    """The cases in order; None stands for the loss, which has shapes of its own and comes after the first of them."""
    cases = cases_of(args)
    first = [c for c in cases if c.op == "train"][: len(args.shapes)]
    yield from first
    if "loss" in args.ops:
        yield None
    yield from (c for c in cases if c not in first)
