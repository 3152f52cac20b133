"""Writes what follows from the settings: ``ds_configs/schema.json`` for editors, ``docs/configuration.md`` for readers.

After a change of ijepa_ds/settings.py: ``python -m ijepa_ds.config_reference``
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import WithDefaultSchema

from ijepa_ds.exchange.reference_yaml import Released
from ijepa_ds.files import PROJECT, replacing
from ijepa_ds.settings import CHANGEABLE, ConfigFile, IJEPAConfig
from ijepa_ds.validation import Checked, section_of

SCHEMA, TABLE = PROJECT / "ds_configs" / "schema.json", PROJECT / "docs" / "configuration.md"
_INTRODUCTION = """# All settings

A configuration is a DeepSpeed JSON with one more object, `"ijepa"`; `--set KEY=JSON` changes one value. Editors check
and complete a file that names `ds_configs/schema.json` under `"$schema"`. Only what is marked may change when a run is
resumed. This page and the schema are written by `python -m ijepa_ds.config_reference`.
"""
_RELEASED = """## From the released code's YAML

What `python -m ijepa_ds convert-config` makes of each key; any other is refused.
"""
_KINDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "object (below)",
}


class _Schema(GenerateJsonSchema):
    """Without titles, which would repeat the keys, and without the defaults of whole sections."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: WithDefaultSchema) -> JsonSchemaValue:
        if isinstance(schema.get("default"), Checked):
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def schema() -> str:
    """The JSON schema of a configuration's file."""
    content = ConfigFile.model_json_schema(schema_generator=_Schema)
    content["properties"] = {"$schema": {"type": "string"}, **content["properties"]}
    return json.dumps({"$schema": GenerateJsonSchema.schema_dialect, **content}, indent=1) + "\n"


def table() -> str:
    """The page with every setting's default, values and meaning."""
    parts = [_INTRODUCTION, _section("", ConfigFile)]
    for name, field in ConfigFile.model_fields.items():
        if name != "ijepa" and (model := section_of(field.annotation)):
            parts.append(_section(name, model, changeable=field.json_schema_extra == CHANGEABLE))
    for name, field in IJEPAConfig.model_fields.items():
        if model := section_of(field.annotation):
            parts.append(_section(f"ijepa.{name}", model))
    return "\n".join([*parts, _section("ijepa", IJEPAConfig), _released()])


def _section(name: str, model: type[Checked], *, changeable: bool = False) -> str:
    """The table of a section's keys; ``changeable``: all of them on a resume."""
    content = model.model_json_schema(schema_generator=_Schema)
    lines = [
        f"## {name or 'Top level'}\n",
        f"{content['description']}\n",
        "| key | default | values | meaning | on a resume |",
        "|---|---|---|---|---|",
    ]
    for key, values in content["properties"].items():
        if "description" not in values:
            continue  # a section, which has a table of its own; a key that is accepted and has no effect
        default = f"`{json.dumps(values['default'])}`" if values.get("default") is not None else "-"
        cells = [
            f"`{name}{'.' * bool(name)}{key}`",
            "required" if key in content.get("required", ()) else default,
            _values(values),
            values["description"],
            "may change" if changeable or values.items() >= CHANGEABLE.items() else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _released() -> str:
    lines = [_RELEASED, "| key there | key here | |", "|---|---|---|"]
    for section, key, field, ours in Released.fields():
        if ours:
            shown = f"`{ours}`"
        else:
            shown = "-" if field.annotation is Any else f"must be `{json.dumps(field.default)}`"
        lines.append(f"| `{section}.{key}` | {shown} | {field.description} |")
    return "\n".join(lines) + "\n"


def _values(values: dict[str, Any], plural: str = "") -> str:
    """What a JSON schema accepts, in words."""
    if "anyOf" in values:
        return " or ".join(map(_values, values["anyOf"]))
    if "enum" in values:
        return " or ".join(f"`{value}`" for value in values["enum"])
    if "prefixItems" in values:
        return f"{len(values['prefixItems'])} {_values(values['prefixItems'][0], 's')}"
    if values.get("type") == "array":
        return f"list of {_values(values['items'])}"
    low, high, step = (values.get(key) for key in ("minimum", "maximum", "multipleOf"))
    kind = _KINDS.get(values.get("type", "object"), "") + plural
    bounds = "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
    return kind + bounds + (f", a multiple of {step}" if step else "")


def main() -> None:
    """Write both files."""
    for path, text in ((SCHEMA, schema()), (TABLE, table())):
        with replacing(path) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
