"""Texts that are the same have one key, which never changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanothink.data.split import (
    group_key,
    normalised,
    text_key,
)


def test_the_key_of_a_text_never_changes():
    # Written down: a change of hash would move documents between the sides of every existing run.
    assert text_key("NanoThink") == 13148234440110152715
    assert text_key("é") == 3394012004367669963


@pytest.mark.parametrize(
    "twin", ["a\r\nb  c\n", "a\rb\tc", " a b c ", "a\n\nb\u00a0c", "\ufeffa b c"[1:], "a b\u2028c"]
)
def test_line_ends_and_white_space_do_not_make_another_text(twin: str) -> None:
    assert text_key(twin) == text_key("a b c")


def test_the_form_of_unicode_does_not_make_another_text() -> None:
    assert text_key("Cafe\u0301 \u212b") == text_key("Caf\u00e9 \u00c5")
    assert len({text_key(text) for text in ("a b", "ab", "A b", "a b.", "a-b")}) == 5


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("ab\u00e9e\u0301 \n\r\t\u2003", min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(1, 30),
)
def test_a_text_normalised_in_parts_is_the_text_normalised(parts: list[str], n_chars: int) -> None:
    import unicodedata

    from nanothink.data import split

    text = "".join(parts)
    whole = " ".join(unicodedata.normalize("NFC", text).split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_PART_CHARS", n_chars)
        assert normalised(text) == whole
        key = text_key(text)
    assert key == text_key(whole)


def test_a_text_and_a_group_of_one_name_have_nothing_in_common() -> None:
    keys = {group_key("a", None), group_key(None, "a"), text_key("a")}
    assert len(keys) == 3
    assert group_key(None, None) == group_key("", " ") == 0
    assert group_key("g", "s") == group_key("g", None)
    assert all(group_key(str(i), None) % 2 == 1 and group_key(None, str(i)) % 2 == 0 for i in range(50))
