"""Strict JSON is what the standard allows, and each fault is told at the character to change."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanothink.data.strict_json import JsonFault, parse

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
        ('{"a": NaN}', 6, "NaN is not JSON: a number must be finite"),
        ('{"a": -Infinity}', 6, "must be finite"),
        ('{"a": "NaN [{", "b": NaN}', 21, "must be finite"),
        ('{"a": 1,}', 7, "a comma before '}'"),
        ('{"a": [1, 2, ]}', 11, "a comma before ']'"),
        ('{"a": 1 // x\n}', 8, "expecting ',' delimiter, found `//`"),
        ("{'a': 1}", 1, "in double quotes, found `'a'`"),
        ('{"a": True}', 6, "expecting value, found `True`"),
        ('{"a": 01}', 7, "expecting ',' delimiter, found `1`"),
        ('{"a": 1} {"a": 2}', 9, "extra data, found '{'"),
        ('{"a": 1},', 8, "extra data, found ','"),
        ('{"a": 1}\r{"a": 2}', 8, "carriage return"),
        ('{"a"', 4, "expecting ':' delimiter, found the end"),
        ('{"a": "x', 6, "unterminated string, found '\"'"),
        ('{"a": "x\x01y"}', 8, "invalid control character, found U+0001"),
        ('{"a": "\\\\ud800", "b": "\\uDFFF"}', 23, "surrogate"),
        ('{"a": "\\x41"}', 7, r"invalid \escape"),
        ('{"é": "ü\\ud800"}', 8, "surrogate"),
        ('{"a": "\\udc00\\ud800"}', 7, "surrogate"),
        ('{"\\ud800": 1}', 2, "surrogate"),
        ('\ufeff{"a": 1}', 0, "found a byte-order mark"),
        ('{"a":\u00a01}', 5, "U+00A0"),
        ("", 0, "expecting value, found the end"),
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
def test_deep_nesting_is_a_fault_and_not_the_end_of_the_process(opening, closing):
    assert parse(opening * 700 + "1" + closing * 700)
    with pytest.raises(JsonFault, match="nested too deeply"):
        parse(opening * 100_000)


def test_numbers_beyond_any_type_are_infinite():
    assert parse("[1e999, -1e999]") == [float("inf"), float("-inf")]
    assert parse("9" * 5000) == float("inf")
    assert parse("9" * 4000) == int("9" * 4000)
