"""Values that others wrote: JSON that is read in one place, and pydantic models that say every problem in our words.

Every reader of JSON goes through :func:`parse_json` or :func:`load_json`. A file may be missing, a folder, damaged or
made to do harm: what comes of it is a value, or one exception with a clause that says why there is none.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
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
MOST_BYTES = 100_000_000  # of a file: a note on millions of images has tens of megabytes
MOST_LEVELS = 64  # of objects and lists within one another: Python's own functions give up at some hundreds
MOST_DIGITS = 400  # of a whole number: the largest float has 309
_SHOWN = 200  # characters of a value in a sentence
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


class NotJSON(ValueError):
    """A text that is not JSON; the message is a clause that says why."""


class Unwieldy(NotJSON):
    """JSON that is not taken: too large, too deep, or with a key that stands twice in one object."""


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


def read_json(
    model: type[Model], path: Path, complaint: str, cure: str = "get it again", *, nan: bool = False
) -> Model:
    """Return what a JSON file holds; it is refused with all its problems, which follow ``complaint``.

    ``nan``: of :func:`load_json`.

    Raises:
        UserError: the file cannot be read, which is followed by ``cure``, or it does not fit ``model``.
    """
    try:
        raw = load_json(path, nan=nan)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: it is missing or damaged ({reason(error)}); {cure}") from None
    values, problems = check(model, raw)
    if values is None:
        raise UserError(f"{path} {complaint}:{listing(problems)}")
    return values


def load_json(
    path: str | os.PathLike,
    *,
    most_bytes: int = MOST_BYTES,
    shorten: Callable[[dict[str, Any]], object] | None = None,
    nan: bool = False,
) -> Any:
    """What a file of JSON says, as :func:`parse_json` reads it.

    Raises:
        OSError: it is missing, a folder, or cannot be opened.
        NotJSON: it is no JSON, or larger than ``most_bytes``.
    """
    return parse_json(read_bytes(path, most_bytes), shorten=shorten, nan=nan)


def read_bytes(path: str | os.PathLike, most_bytes: int = MOST_BYTES) -> bytes:
    """A whole file or what comes out of a pipe; :class:`Unwieldy` where that is more than ``most_bytes``."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size  # of a pipe or a device 0
        if size <= most_bytes:
            data = file.read() if size else file.read(most_bytes + 1)
            size = len(data)
    if size > most_bytes:
        raise Unwieldy(f"it is larger than {most_bytes / 1e6:,.0f} MB")
    return data


def parse_json(
    text: str | bytes, *, shorten: Callable[[dict[str, Any]], object] | None = None, nan: bool = False
) -> Any:
    """What a JSON text says. NaN, infinity and a key that stands twice in an object are refused, unlike by ``json``.

    Args:
        text: bytes are UTF-8.
        shorten: is called with each object, the innermost first; what it returns stands in the object's place, so that
            a long text never has to be in memory as a whole. Its exceptions pass.
        nan: take NaN and infinity, as ``json`` writes them.

    Raises:
        NotJSON: it is none; :class:`Unwieldy`, a kind of it, where it is not taken for another reason.
    """

    def members(pairs: list[tuple[str, Any]]) -> object:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise Unwieldy(f"the key {_shown(next(_repeated(pairs)))} stands twice in one object")
        return found if shorten is None else shorten(found)

    try:
        if isinstance(text, bytes):
            text = text.decode()
        parsers: dict[str, Any] = {
            "parse_int": _whole,
            "parse_float": _finite,
            "parse_constant": float if nan else _refuse,
        }
        value = json.loads(text, object_pairs_hook=members, **parsers)
    except UnicodeDecodeError as error:
        raise NotJSON(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise NotJSON(str(error)) from None
    except RecursionError:
        raise _too_deep() from None
    check_levels(value)
    return value


def check_levels(value: object) -> None:
    """Refuse more levels of lists and dictionaries than Python's own functions bear, and those without an end.

    What occurs in several places of a level is looked at once: YAML can repeat a part 2^60 times in a few lines.

    Raises:
        Unwieldy: there are more than ``MOST_LEVELS``.
    """
    level: dict[int, Any] = {id(value): value}
    for _ in range(MOST_LEVELS + 1):
        insides = (_inside(outer) for outer in level.values())
        level = {id(inner): inner for inside in insides for inner in inside if isinstance(inner, dict | list)}
        if not level:
            return
    raise _too_deep()


def reason(error: Exception) -> str:
    """Why a file could not be read, in a clause: what the system says, or the message, on one line."""
    return _cut((isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()))


def is_path(text: str) -> bool:
    """Whether there can be a file of that name: a system's function would raise ValueError at some, not OSError."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # half of a pair of code units, as JSON can write it
        return False
    return b"\0" not in raw and len(raw) < 4096 and all(len(part) < 256 for part in raw.split(b"/"))


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _repeated(pairs: list[tuple[str, Any]]) -> Iterator[str]:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            yield key
        seen.add(key)


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise Unwieldy(f"a number has {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise Unwieldy(f"the number {_cut(text)} is larger than any that is computed with")


def _refuse(text: str) -> float:
    raise NotJSON(f"{text} is no number of JSON")


def _too_deep() -> Unwieldy:
    return Unwieldy(f"lists and objects lie within one another more than {MOST_LEVELS} deep")


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
    if not all(map(is_path, names)):
        raise ValueError("cannot be the name of a file")
    return value


Count = Annotated[int, Field(ge=1)]
Pair = Annotated[tuple[T, T], _as_tuple(2)]
Triple = Annotated[tuple[T, T, T], _as_tuple(3)]
Bounds = Annotated[Pair[T], must(lambda pair: pair[0] <= pair[1], "must be given as [smallest, largest]")]
Files = Annotated[str | Annotated[list[str], Field(min_length=1)], BeforeValidator(_named)]
Side = Annotated[int, Field(ge=4, le=4096)]
ImageSize = Annotated[Pair[Side], BeforeValidator(_twice, json_schema_input_type=Side | Pair[Side])]


def section_of(annotation: Any) -> type[Checked] | None:
    """The model that a field of this type holds, if it holds one, or it or none."""
    if isinstance(annotation, types.UnionType):
        annotation = next((kind for kind in typing.get_args(annotation) if kind is not type(None)), None)
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
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{_plain(part)}" for part in location).removeprefix(".")
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
    return f"{key} = {_shown(value)} {complaint}" if key else complaint


def _plain(key: str) -> str:
    """A key of somebody else's in a sentence."""
    return key if key.isprintable() and len(key) <= _SHOWN else _shown(key)


def _shown(value: object) -> str:
    """A value as JSON, its beginning where it is long; it may have no end."""
    try:
        parts = itertools.islice(json.JSONEncoder(default=repr).iterencode(value), _SHOWN + 1)
        text = "".join(parts)
    except (ValueError, RecursionError):  # a number of thousands of digits, from YAML; a list within itself
        return f"a value ({json_kind(value)})"
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def _choice(value: Any, expected: str, description: str | None) -> str:
    """What a value must be that is none of ``expected``, such as ``'a' or 'b'``; where only one is, also why."""
    choices = re.findall("'(.*?)'", expected) or [expected.lower()]
    if len(choices) == 1:
        return f"must be {choices[0]}" + (f": {description}" if description else "")
    close = difflib.get_close_matches(value if isinstance(value, str) else "", choices, n=1, cutoff=0.5)
    return f"must be one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
