"""docs/fields.md is what the code says, and the code has what TRL has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from lowvram_grpo import GRPOConfig
from lowvram_grpo.recipe import field_table
from lowvram_grpo.recipe.combinations import _READ_BY
from lowvram_grpo.recipe.notices import INERT_FIELDS
from lowvram_grpo.recipe.resolve import resolve
from lowvram_grpo.recipe.settings import REFUSED_FIELDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "fields.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == field_table.page(), (
        "python -m lowvram_grpo.recipe.field_table > docs/fields.md"
    )


def test_the_page_has_every_field_that_grpoconfig_declares_once():
    page = field_table.page()
    assert all(page.count(f"| `{name}` |") == 1 for name in GRPOConfig.__annotations__)
    own = page.split("## Our own")[1].split("## Names")[0]
    assert "`kl_estimator`" in own and "`beta`" not in own and own.count("| `") > 25
    assert "(no effect" not in page


def test_the_tables_name_fields():
    known = {f.name for f in dataclasses.fields(GRPOConfig)} | {"group_by_length"}  # of transformers before 5.2
    tables = [
        INERT_FIELDS,
        REFUSED_FIELDS,
        _READ_BY,
        field_table.TRL_DEFAULTS,
        field_table.EARLIER,
        field_table._GROUPS,
    ]
    assert all(set(table) <= known for table in tables)
    assert not set(INERT_FIELDS) & set(REFUSED_FIELDS)


def test_a_recipe_file_may_have_any_of_them(tmp_path):
    values = {name: getattr(GRPOConfig, name, None) for name in GRPOConfig.__annotations__}
    given = {name: value for name, value in values.items() if value is not None} | {
        "router_aux_loss_coef": 0.01, "pad_to_multiple_of": "8", "off_policy_mask_threshold": "0.5",
        "transformers_continuous_batching_config": {"a": 1}, "max_tool_calling_iterations": 3,
        "log_completions_hub_repo": "me/x", "log_completions": True, "top_entropy_quantile": 0.2,
        "multi_objective_aggregation": "normalize_then_sum", "entropy_coef": 1e-3, "loss_type": "vespo",
    }  # fmt: skip
    (tmp_path / "config_demo.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    recipe = resolve({}, tmp_path / "config_demo.yaml")
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **recipe.training)
    assert (args.pad_to_multiple_of, args.off_policy_mask_threshold, args.entropy_coef) == (8, 0.5, 1e-3)
    assert args.transformers_continuous_batching_config == {"a": 1} and args.log_completions_hub_repo == "me/x"
    again = tmp_path / "again.toml"
    again.write_text(recipe.to_toml(), encoding="utf-8")
    assert resolve({}, again).training == recipe.training


@pytest.fixture(scope="module")
def trls():
    trl = pytest.importorskip("trl", reason="TRL is not installed, whose fields are compared with ours")
    if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 16):
        pytest.skip(f"TRL is {trl.__version__}, and 1.16's fields are compared with ours")
    return {f.name: f for f in dataclasses.fields(trl.GRPOConfig)}


def default_of(field):
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def test_every_field_of_trl_is_one_here(trls):
    ours = {f.name: f for f in dataclasses.fields(GRPOConfig)}
    assert not set(trls) - set(ours)
    others = {name: default_of(f) for name, f in trls.items() if default_of(f) != default_of(ours[name])}
    assert others == field_table.TRL_DEFAULTS


def test_the_page_tells_trls_fields_from_the_others(trls):
    ours = {each.name for each in field_table.entries() if each.ours}
    assert not ours & set(trls)
    assert set(GRPOConfig.__annotations__) - ours - set(trls) == set(field_table.EARLIER)
