"""Strict JSON is what the standard allows, and each fault is told at the character to change."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanothink.data.strict_json import MAX_DEPTH, JsonFault, members, parse

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_takes_whatever_the_standard_library_writes(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert parse(text) == value
    if isinstance(value, dict):
        found = members(text)
        assert [(m.key, m.value) for m in found] == list(value.items())
        places = [(m.key_start, m.start) for m in found]
        read = [tuple(json.JSONDecoder().raw_decode(text, at)[0] for at in pair) for pair in places]
        assert read == list(value.items())


@given(st.text(alphabet='{}[]",:\\u0d8c9 \n\t1-+.eEtrufalsn', max_size=30))
def test_refuses_what_the_standard_library_refuses(text):
    def forbidden(constant):
        raise ValueError(constant)

    try:
        json.dumps(json.loads(text, parse_constant=forbidden), ensure_ascii=False).encode()
        valid = True
    except ValueError:
        valid = False
    if valid:
        parse(text)
    else:
        with pytest.raises(JsonFault) as caught:
            parse(text)
        assert 0 <= caught.value.position <= len(text)


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ('{"a": NaN}', 6, "must be finite"),
        ('{"a": Infinity}', 6, "must be finite"),
        ('{"a": -Infinity}', 6, "must be finite"),
        ('{"a": 1,}', 7, "a comma before '}'"),
        ('{"a": [1, 2, ]}', 11, "a comma before ']'"),
        ('{"a": 1 // x\n}', 8, "comments"),
        ('{"a": /* x */ 1}', 6, "comments"),
        ('{# x\n"a": 1}', 1, "comments"),
        ("{'a': 1}", 1, "double quotes, not single"),
        ("{\"a\": 'x'}", 6, "double quotes, not single"),
        ("{a: 1}", 1, "a key must stand in double quotes, found a"),
        ('{"a": x}', 6, "text must stand in double quotes"),
        ('{"a": True}', 6, "write true, false or null"),
        ('{"a": None}', 6, "write true, false or null"),
        ('{"a": 01}', 6, "leading zero"),
        ('{"a": -012}', 6, "leading zero"),
        ('{"a": +1}', 6, "must not begin with '+'"),
        ('{"a": 1.}', 6, "not a number as JSON"),
        ('{"a": .5}', 6, "not a number as JSON"),
        ('{"a": 0x1F}', 6, "not a number as JSON"),
        ('{"a": 1e}', 6, "not a number as JSON"),
        ('{"a": 1} {"a": 2}', 9, "a second value on the same line"),
        ('{"a": 1} x', 9, "extra data"),
        ('{"a": 1},', 8, "a comma after the value"),
        ('{"a": 1}\r{"a": 2}', 8, "carriage return"),
        ('{"a" 1}', 5, "a colon must follow"),
        ('{"a"', 4, "a colon must follow the key, found the end"),
        ('{"a": }', 6, "a value is due, found '}'"),
        ('{"a": ', 6, "ends where a value is due"),
        ('{"a": 1', 7, "a closing '}' is missing"),
        ('{"a": [1', 8, "a closing ']' is missing"),
        ("{", 1, "a closing '}' is missing"),
        ('{"a": 1 "b": 2}', 8, "a comma or '}' is due"),
        ('{"a": "x', 6, "no closing quote"),
        ('{"a": "x\\', 6, "no closing quote"),
        ('{"a": "x\ty"}', 8, "write it as \\t"),
        ('{"a": "x\x01y"}', 8, "U+0001"),
        ('{"a": "x\\u00e9', 14, "within a string, whose closing quote is missing"),
        ('{"a": truer}', 6, "`truer` is not a JSON value"),
        ('{"a": "NaN [{", "b": NaN}', 21, "must be finite"),
        ('{"a": "\\\\ud800", "b": "\\uDFFF"}', 23, "surrogate"),
        ('{"a": "\\x41"}', 7, "not an escape"),
        ('{"a": "\\u12g4"}', 7, "four hexadecimal digits"),
        ('{"é": "ü\\ud800"}', 8, "surrogate"),
        ('{"a": "\\udc00\\ud800"}', 7, "surrogate"),
        ('{"\\ud800": 1}', 2, "surrogate"),
        ('\ufeff{"a": 1}', 0, "byte-order mark"),
        ('{"a":\u00a01}', 5, "U+00A0"),
        ("", 0, "ends where a value is due"),
    ],
)
def test_says_where_and_why(text, position, words):
    with pytest.raises(JsonFault) as caught:
        parse(text)
    assert words in caught.value.reason
    assert caught.value.position == position


def test_surrogate_pairs_are_one_character():
    assert parse('{"a": "\\ud83d\\uDE00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}")])
def test_depth_is_bounded_exactly_whatever_the_stack_allows(opening, closing):
    inner = "1"
    text = opening * MAX_DEPTH + inner + closing * MAX_DEPTH
    value = parse(text)
    for _ in range(MAX_DEPTH):
        (value,) = value.values() if isinstance(value, dict) else value
    assert value == 1
    assert len(members('{"a": ' + opening * (MAX_DEPTH - 1) + inner + closing * (MAX_DEPTH - 1) + "}")) == 1
    for deeper in (opening + text + closing, opening * 100_000):
        with pytest.raises(JsonFault, match="nested deeper than 1,024") as caught:
            parse(deeper)
        assert caught.value.position == MAX_DEPTH * len(opening)


def test_numbers_beyond_any_type_are_infinite():
    assert parse("[1e999, -1e999]") == [float("inf"), float("-inf")]
    assert parse("9" * 5000) == float("inf")
    assert parse("9" * 4000) == int("9" * 4000)


def test_repeated_keys_are_all_told():
    found = members('{"a": 1, "b": {"a": 0}, "a": [2, {"a": 3}]}')
    assert [(m.key, m.key_start, m.start) for m in found] == [("a", 1, 6), ("b", 9, 14), ("a", 24, 29)]
