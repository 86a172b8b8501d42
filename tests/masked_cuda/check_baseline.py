"""Syncs, copies and launches stay what baseline.txt says, or fall and are written down."""

from __future__ import annotations

from tests.masked_cuda import baseline


def test_syncs_copies_and_launches_are_those_of_the_baseline():
    found, known = (
        {line: count for line, count in counts.items() if baseline.comparable(line)}
        for counts in (baseline.counts(), baseline.read()[0])
    )
    said = baseline.difference(found, known)
    assert not said, "\n".join(
        [*said, "python -m tests.masked_cuda.baseline --write takes them over; give the new lines their reasons."]
    )


def test_every_line_that_waits_says_why():
    known, why = baseline.read()
    unsaid = [line for line in known if line.where and not why[line]]
    assert not unsaid, unsaid


def test_the_baseline_is_told_what_rose_and_what_fell():
    line = baseline.Line("look", "download", "rollout/decode.py:finished_rows")
    rose, fell = (baseline.difference({line: now}, {line: 2})[0] for now in (3, 1))
    assert "3, baseline 2 (more than before)" in rose and "lower the baseline" in fell
    assert not baseline.difference({line: 2}, {line: 2})
