"""docs/models.md beside the tables: its prose, and that every family is somewhere tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_dense_families import FAMILIES as DENSE
from test_families_of_experts import FAMILIES as EXPERTS
from test_hybrid_families import FAMILIES as HYBRID

from lowvram_grpo.policy.known_models import lookup
from tests.families import table
from tests.families.cells import CELLS, merged
from tests.families.zoo import FAMILIES, NAMED, tiny

TEXT = table.PAGE.read_text(encoding="utf-8")


def test_every_family_is_tested_and_on_the_page():
    tested = [each.values[0].name for each in (*DENSE, *EXPERTS, *HYBRID)]
    assert sorted(tested) == sorted(NAMED) == sorted(table.cells_of(TEXT))


def test_cells_of_a_page_are_what_they_were_made_of():
    notes: list[str] = []
    cells = dict(zip(CELLS, ["yes", "yes, but slowly", "no: a reason", "yes, but slowly", "yes", "yes", "no: other"]))
    line = table._line(NAMED["Qwen3"], cells, notes)
    assert (
        line[1:4] == ("yes", "yes [1]", "no [2]") and line[4] == "yes [1]" and notes == ["slowly", "a reason", "other"]
    )
    page = table._table(("family", *CELLS), [line]) + "\n\n" + "\n".join(f"{i}. {n}." for i, n in enumerate(notes, 1))
    assert table.cells_of(page)["Qwen3"] == cells


def test_prose_and_tables_that_cost_little_are_up_to_date():
    """Those whose cells are computed are compared family by family, beside this."""
    if table.versions() not in TEXT:
        pytest.skip("the page is of other versions of the libraries")
    said = "python -m tests.families.table > docs/models.md"
    for part in re.split(r"\{\w+\}", Path(table.__file__).with_name("models.md.in").read_text(encoding="utf-8")):
        assert part.strip() in TEXT, said
    assert table._table(("family", "models"), [(f.name, table._members(f)) for f in FAMILIES]) in TEXT, said
    assert table._table(("family", "trained", "left out"), [table._targets_line(f) for f in FAMILIES]) in TEXT, said
    for line in table._whole_lines():
        assert " | ".join(line) in TEXT, said


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
def test_members_are_known_by_their_names(family):
    assert family.members and all(lookup(name) or "/" in name for name in family.members)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
def test_two_layers_of_each_kind_at_least(family):
    kinds = (
        getattr(tiny(family).config, "layer_types", None) or ["full_attention"] * tiny(family).config.num_hidden_layers
    )
    assert all(kinds.count(kind) >= 2 for kind in kinds)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
def test_a_merged_adapter_is_the_adapter(family):
    assert merged(family) == "yes"
