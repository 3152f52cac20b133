"""Values of others against models: what is taken, and how each problem is said."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError

from ijepa_ds.errors import UserError
from ijepa_ds.validation import Bounds, Checked, Count, NotJSON, Pair, check, must, nearest, parse_json, read_json


class Part(Checked):
    size: Count
    ratio: float = Field(1.0, le=2)


class Choice(Checked):
    kind: Literal["first", "second"] = "first"


class Whole(Checked):
    unknown: ClassVar[str] = "is no key"

    part: Part
    parts: list[Part] = Field([], min_length=0)
    pair: Pair[float] = (0.0, 1.0)
    bounds: Bounds[int] = (1, 2)
    kind: Literal["first", "second"] = "first"
    named: dict[str, Choice] = Field(default_factory=dict)
    off: Literal[False] = Field(False, description="nobody has built it")
    even: Annotated[int, must(lambda number: number % 2 == 0, "must be even")] = 0
    free: Any = None


def problems(**values: Any) -> list[str]:
    read, lines = check(Whole, {"part": {"size": 1}, **values})
    assert (read is None) == bool(lines)
    return lines


def test_what_fits_is_taken_and_cannot_be_changed():
    whole, lines = check(Whole, {"part": {"size": 3, "ratio": 1}, "pair": [1, 2], "parts": [{"size": 1}]})
    assert whole is not None and lines == []
    assert whole.pair == (1.0, 2.0) and isinstance(whole.part.ratio, float) and whole.parts[0].size == 1
    with pytest.raises(ValidationError, match="frozen"):
        whole.even = 2


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"part": {}}, ["part.size is missing"]),
        ({"part": 3}, ["part must be an object, not a number"]),
        ({"part": {"size": 0, "ratio": 3}}, ["part.size = 0 must be at least 1", "part.ratio = 3 must be at most 2"]),
        ({"parts": [{"size": 1}, {"size": "x"}]}, ['parts[1].size = "x" must be a whole number']),
        ({"parts": {}}, ["parts = {} must be a list"]),
        ({"pair": [1, None]}, ["pair[1] = null must be a number"]),
        ({"pair": 1}, ["pair = 1 must be a list of 2 numbers"]),
        ({"bounds": [2, 1]}, ["bounds = [2, 1] must be given as [smallest, largest]"]),
        ({"kind": "frist"}, ['kind = "frist" must be one of first, second; did you mean first?']),
        ({"kind": 3}, ["kind = 3 must be one of first, second"]),
        ({"named": {"a": {"kind": 3}}}, ["named.a.kind = 3 must be one of first, second"]),
        ({"off": True}, ["off = true must be false: nobody has built it"]),
        ({"even": 3}, ["even = 3 must be even"]),
        ({"evne": 2}, ["evne is no key; did you mean even?"]),
        ({"part": {"size": 1, "xyz": 2}}, ["part.xyz is not a setting; valid: ratio, size"]),
        ({"free": object}, []),
    ],
)
def test_every_problem_is_a_line(values, lines):
    assert problems(**values) == lines


def test_a_section_that_is_left_out_lacks_each_of_its_keys():
    assert check(Whole, {})[1] == ["part.size is missing"]
    assert check(Whole, [])[1] == ["it must be an object, not a list"]


def test_nearest_names():
    assert nearest("seeed", ["seed", "name"]) == "; did you mean seed?"
    assert nearest("xyz", ["seed", "name"]) == "; valid: name, seed"


def test_a_json_file(tmp_path: Path):
    path = tmp_path / "part.json"
    path.write_text('{"size": 2}')
    assert read_json(Part, path, "is no part") == Part(size=2)
    path.write_text('{"size": 0, "ratio": true}')
    with pytest.raises(UserError, match=r"part\.json is no part:\n  - size = 0 .*\n  - ratio = true must be a number$"):
        read_json(Part, path, "is no part")
    for content in (b"{", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"part\.json cannot be read: it is missing or damaged \(.*\); get it again"
        ):
            read_json(Part, path, "is no part")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(Part, tmp_path / "none.json", "is no part")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": {"b": 1, "b": 2}}', 'the key "b" stands twice in one object'),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number of JSON"),
        ("1" * 4300, "a number has 4,300 digits"),
        ("1e999", "the number 1e999 is larger than any"),
        ("[" * 1000 + "]" * 1000, "more than 64 deep"),
        ("[" * 100_000, "more than 64 deep"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_is_not_taken_says_why(text: str | bytes, why: str) -> None:
    with pytest.raises(NotJSON) as refusal:
        parse_json(text)
    assert why in str(refusal.value)
    assert parse_json('{"a": [1, 2.5, null, "\u00e9"]}') == {"a": [1, 2.5, None, "\u00e9"]}
