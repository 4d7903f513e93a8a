"""The slow look agrees with the standard library on what JSON is, and points at the right character."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanothink.data.strict_json import MAX_DEPTH, JsonFault, scan

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
    members = scan(text)
    if isinstance(value, dict):
        assert members is not None
        assert {m.key: json.loads(text[m.start : m.end]) for m in members} == value
        assert [json.JSONDecoder().raw_decode(text, m.key_start)[0] for m in members] == list(value)
    else:
        assert members is None


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
        scan(text)
    else:
        with pytest.raises(JsonFault) as caught:
            scan(text)
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
        scan(text)
    assert words in caught.value.reason
    assert caught.value.position == position


def test_surrogate_pairs_are_one_character():
    assert scan('{"a": "\\ud83d\\uDE00"}') is not None


def test_depth_is_bounded_exactly_and_without_recursion():
    assert scan("[" * MAX_DEPTH + "]" * MAX_DEPTH) is None
    with pytest.raises(JsonFault, match="nested deeper than 1,024") as caught:
        scan("[" * 100_000)
    assert caught.value.position == MAX_DEPTH


def test_repeated_keys_are_all_told():
    members = scan('{"a": 1, "b": {"a": 0}, "a": [2, {"a": 3}]}')
    assert members is not None
    assert [(m.key, m.key_start) for m in members] == [("a", 1), ("b", 9), ("a", 24)]
