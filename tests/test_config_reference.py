"""What is written from the settings: the schema that editors read, and the page of all keys."""

from __future__ import annotations

import json
import re

import pytest
from test_config import CONFIGS, raw

from ijepa_ds.config import load_config, parse_config
from ijepa_ds.config_reference import SCHEMA, TABLE, schema, table


@pytest.mark.parametrize(("path", "text"), [(SCHEMA, schema()), (TABLE, table())], ids=["schema", "table"])
def test_the_written_files_are_those_of_the_settings(path, text):
    assert path.read_text() == text, "python -m ijepa_ds.config_reference writes it anew"


def test_the_table_has_every_setting_and_marks_what_a_resume_may_change():
    ours, _, _ = table().partition("## From the released code")
    rows = dict(re.findall(r"^\| `([a-z_0-9.]+)` \|.*\| (.*?) ?\|$", ours, re.MULTILINE))
    config = parse_config(raw())
    recipe, ours = config.recipe(), config.as_dict()["ijepa"]
    nested = {f"ijepa.{section}": part for section, part in ours.items()}
    settings = {
        f"{key}.{name}" if name else key
        for key, part in nested.items()
        for name in (part if isinstance(part, dict) else [""])
    }
    assert {key for key in rows if key.startswith("ijepa.")} == settings
    sections = {key for key in rows if "." in key and not key.startswith("ijepa.")}  # DeepSpeed's: compared as a whole
    assert {"bf16.enabled", "zero_optimization.stage", "timers.throughput"} < sections
    assert {key for key, mark in rows.items() if not mark} - sections == recipe.keys()
    assert all(rows[key] == rows[key.partition(".")[0]] for key in sections)
    assert set(rows.values()) == {"", "may change"}


def test_the_schema_knows_what_the_checks_know():
    content = json.loads(schema())
    definitions = content["$defs"]
    assert content["required"] == ["train_batch_size", "train_micro_batch_size_per_gpu", "ijepa"]
    assert definitions["IJEPAConfig"]["required"] == ["run", "data", "model"]
    assert not content["additionalProperties"] and not definitions["MasksConfig"]["additionalProperties"]
    assert not definitions["ZeroOptimization"]["additionalProperties"]
    assert definitions["ZeroOptimization"]["properties"]["stage"]["enum"] == [0, 1, 2]
    assert definitions["ModelConfig"]["properties"]["predictor_width"]["multipleOf"] == 4
    one_number, two = definitions["DataConfig"]["properties"]["image_size"]["anyOf"]
    assert one_number["type"] == "integer" and [side["maximum"] for side in two["prefixItems"]] == [4096, 4096]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_the_schema_first_and_no_run_sees_it(path):
    first, reference = next(iter(json.loads(path.read_text()).items()))
    assert first == "$schema" and (path.parent / reference).resolve() == SCHEMA
    config = load_config(path)
    assert "$schema" not in config.deepspeed and "$schema" not in config.as_dict()


def test_a_users_file_may_name_any_schema():
    assert parse_config({"$schema": "https://example.org/schema.json", **raw()}) == parse_config(raw())
