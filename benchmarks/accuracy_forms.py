r"""Does the reward `accuracy` know a number in every form that people write it? And is one more always wrong?

    python benchmarks/accuracy_forms.py path/to/gsm8k/test.jsonl

Each reference of the file (GSM8K's: the number behind `####`) is written in each form and compared with itself, which
must give 1, and the form of the reference plus one is, which must give 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

Form = Callable[[Decimal], str]


def plain(n: Decimal) -> str:
    return f"{n:f}"


def grouped(n: Decimal) -> str:
    return f"{n:,f}"


def money(n: Decimal, sign: str = "$") -> str:
    return f"{'-' if n < 0 else ''}{sign}{abs(n):,f}"


def european(n: Decimal) -> str:
    """`1.234,00`: with two decimals it can't be read in another way."""
    return f"{n:,.2f}".translate(str.maketrans(",.", ".,"))


FORMS: dict[str, Form] = {
    "plain": plain,
    "thousands with a comma": grouped,
    "thousands with \\,": lambda n: f"${grouped(n)}$".replace(",", r"\,"),
    "thousands with {,}": lambda n: f"${grouped(n)}$".replace(",", "{,}"),
    "thousands with a space": lambda n: f"<answer>{grouped(n)}</answer>".replace(",", "\u202f"),
    "European": lambda n: f"<answer>{european(n)}</answer>",
    "two decimals": lambda n: f"The result is {n:.2f}.",
    "boxed": lambda n: rf"So we get \boxed{{{plain(n)}}}.",
    "boxed and bold": lambda n: rf"\boxed{{\textbf{{{grouped(n)}}}}}",
    "bold": lambda n: f"She has **{grouped(n)}** of them.",
    "bold answer": lambda n: f"**Answer:** {plain(n)}",
    "bold in tags": lambda n: f"<answer>**{plain(n)}**</answer>",
    "italic": lambda n: f"It is *{plain(n)}*.",
    "code": lambda n: f"The answer is `{plain(n)}`.",
    "dollar": lambda n: f"The answer is {money(n)}.",
    "dollar in LaTeX": lambda n: f"<answer>{money(n, chr(92) + '$')}</answer>",
    "percent": lambda n: f"<answer>{plain(n)}%</answer>",
    "unit": lambda n: f"<answer>{plain(n)} dollars</answer>",
    "sentence": lambda n: f"Adding both, 3 + 4 = 7. The answer is {plain(n)}.",
    "sentence with unit": lambda n: f"The final answer is {grouped(n)} eggs per day, since 2 of 5 are broken.",
    "Chinese sentence": lambda n: f"答案是{plain(n)}。",
    "tags behind a thought": lambda n: f"<think>3 or 5? 3.</think>\n<answer>{plain(n)}</answer>",
    "inline formula": lambda n: rf"Therefore, the total is \({plain(n)}\).",
    "display formula": lambda n: rf"The final answer is:\n\n\[ \boxed{{{plain(n)}}} \]",
    "equation": lambda n: f"<think>so it is 7</think>Total = 3 + 4 = {plain(n)}",
    "GSM8K": lambda n: f"He ate 3 of 4.\nThat is <<3*4=12>>12.\n#### {grouped(n)}",
    "scientific": lambda n: f"<answer>{n:e}</answer>",
    "variable": lambda n: f"$x = {plain(n)}$",
}


def failures(references: list[str]) -> list[tuple[str, str, str, float | None]]:
    """(reference, form, reply, reward) of all that is not as it must be."""
    from lowvram_grpo.rewards.maths import accuracy

    wrong = []
    for reference in references:
        number = Decimal(reference.rsplit("####", 1)[-1].strip().replace(",", ""))
        for name, form in FORMS.items():
            for value, right in ((number, 1.0), (number + 1, 0.0)):
                reply = form(value)
                if (reward := accuracy([reply], answer=[reference])[0]) != right:
                    wrong.append((reference, name, reply, reward))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="jsonl with a column `answer`, GSM8K's for instance")
    lines = parser.parse_args().data.read_text(encoding="utf-8").splitlines()
    references = [json.loads(line)["answer"] for line in lines if line.strip()]
    start = time.perf_counter()
    wrong = failures(references)
    seconds = time.perf_counter() - start
    pairs = len(references) * len(FORMS) * 2
    for reference, name, reply, reward in wrong[:20]:
        print(f"{name}: {reply!r} for {reference[-20:]!r} gives {reward}")
    print(
        f"{len(references)} references in {len(FORMS)} forms, each with its like and with one more: "
        f"{len(wrong)} of {pairs} pairs wrong; {pairs / seconds:,.0f} pairs a second"
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
