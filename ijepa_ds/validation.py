"""Values that others wrote, checked by pydantic models: every problem at once, each in this project's words."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ijepa_ds.errors import UserError, listing

# pydantic's types of errors -> what is said of a value; in braces, what pydantic tells with the error.
_COMPLAINTS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must hold at least {min_length}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "value_error": "{error}",
}
_JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


class Checked(BaseModel):
    """Values of exactly their kind: no text for a number, no number for a switch, nothing unknown.

    A section that is left out is checked as an empty one, so that everything it lacks is named.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)
    unknown: ClassVar[str] = "is not a setting"  # said of a key that the model does not have

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        needed = (
            name for name, field in cls.model_fields.items() if field.is_required() and section_of(field.annotation)
        )
        return {**{name: {} for name in needed}, **raw}


def check(model: type[Model], raw: object) -> tuple[Model | None, list[str]]:
    """Return what ``raw`` holds and no problems, or None and all problems."""
    try:
        return model.model_validate(raw), []
    except ValidationError as error:
        return None, [_problem(model, detail) for detail in error.errors(include_url=False)]


def read_json(model: type[Model], path: Path, complaint: str) -> Model:
    """Return what a JSON file holds; it is refused with all its problems, which follow ``complaint``."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: it is missing or damaged ({error}); get it again") from None
    values, problems = check(model, raw)
    if values is None:
        raise UserError(f"{path} {complaint}:{listing(problems)}")
    return values


def must(fits: Callable[[Any], bool], complaint: str) -> AfterValidator:
    """Annotate a type whose values must also pass ``fits``; ``complaint`` follows the key and the value."""

    def validate(value: Any) -> Any:
        if not fits(value):
            raise ValueError(complaint)
        return value

    return AfterValidator(validate)


def _as_tuple(length: int) -> BeforeValidator:
    def convert(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != length:
            raise ValueError(f"must be a list of {length} numbers")
        return tuple(value)

    return BeforeValidator(convert)


def _twice(value: Any) -> Any:
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


def _named(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("must name a file, or a list of files")
    return value


Count = Annotated[int, Field(ge=1)]
Pair = Annotated[tuple[T, T], _as_tuple(2)]
Triple = Annotated[tuple[T, T, T], _as_tuple(3)]
Bounds = Annotated[Pair[T], must(lambda pair: pair[0] <= pair[1], "must be given as [smallest, largest]")]
Files = Annotated[str | Annotated[list[str], Field(min_length=1)], BeforeValidator(_named)]
Side = Annotated[int, Field(ge=4, le=4096)]
ImageSize = Annotated[Pair[Side], BeforeValidator(_twice, json_schema_input_type=Side | Pair[Side])]


def section_of(annotation: Any) -> type[Checked] | None:
    """The model that a field of this type holds, if it holds one."""
    is_class = isinstance(annotation, type) and typing.get_origin(annotation) is None
    return annotation if is_class and issubclass(annotation, Checked) else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """What may have been meant by an unknown name: the nearest valid one, or all where none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(valid)}"


def json_kind(value: Any) -> str:
    """The kind of a value of JSON, with its article."""
    return _JSON_KINDS.get(type(value), "a number")


def _problem(model: type[BaseModel], detail: ErrorDetails) -> str:
    """One problem as a line: the key, the value and what it must be."""
    location, kind, value = detail["loc"], detail["type"], detail["input"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    if kind == "missing":
        return f"{key} is missing"
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        model = (section_of(field.annotation) if field else None) or model
    if kind == "extra_forbidden":
        unknown = getattr(model, "unknown", Checked.unknown)
        return f"{key} {unknown}{nearest(str(location[-1]), model.model_fields)}"
    if kind in ("model_type", "dict_type"):
        return f"{key or 'it'} must be an object, not {json_kind(value)}"
    complaint = detail["msg"].replace("Input should", "must")
    if kind in _COMPLAINTS:
        complaint = _COMPLAINTS[kind].format(**detail.get("ctx", {}))
    elif kind == "literal_error":
        field = model.model_fields.get(str(location[-1]))  # None below a dictionary of models
        complaint = _choice(value, detail["ctx"]["expected"], field.description if field else None)
    return f"{key} = {json.dumps(value, default=repr)} {complaint}" if key else complaint


def _choice(value: Any, expected: str, description: str | None) -> str:
    """What a value must be that is none of ``expected``, such as ``'a' or 'b'``; where only one is, also why."""
    choices = re.findall("'(.*?)'", expected) or [expected.lower()]
    if len(choices) == 1:
        return f"must be {choices[0]}" + (f": {description}" if description else "")
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"must be one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
