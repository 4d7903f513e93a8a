"""A text ends where a stop string begins, however tokens cut it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanothink.inference.stopping import StoppingDecoder


class Letters:
    def decode(self, ids: list[int], /) -> str:
        return "".join(map(chr, ids))


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_it_ends_at_the_first_stop_string_and_shows_nothing_of_it(text: str, stop: list[str]) -> None:
    decoder, shown = StoppingDecoder(Letters(), stop), ""
    for place, letter in enumerate(text, start=1):
        shown += decoder.push(ord(letter))
        found = [at for word in stop if (at := text[:place].find(word)) >= 0]
        assert decoder.stopped == bool(found)
        if found:
            break
        assert text.startswith(shown)
    shown += decoder.flush()
    ends = [at for word in stop if (at := text[:place].find(word)) >= 0] if text else []
    assert shown == text[: min(ends)] if ends else shown == text
    assert decoder.flush() == ""


def test_text_that_cannot_begin_a_stop_string_is_shown_at_once() -> None:
    decoder = StoppingDecoder(Letters(), ["\n\n"])
    assert [decoder.push(ord(letter)) for letter in "a\nb\n"] == ["a", "", "\nb", ""]
    assert decoder.flush() == "\n"
