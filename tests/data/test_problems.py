"""Bad lines by kind: all counted, a few named, whatever their number."""

from __future__ import annotations

from nanothink.data.lines import Problem
from nanothink.data.problems import PLACES, Problems


def found(*problems: tuple[str, int, str]) -> Problems:
    tally = Problems()
    for file, line, reason in problems:
        tally.add(Problem(file, line, 1, reason))
    return tally


def test_one_kind_however_the_data_differs() -> None:
    """Names, values and characters of the data make no kinds; the keys of a record without text do."""
    tally = found(
        ("a", 1, "`bad` is not a JSON value; text must stand in double quotes"),
        ("a", 2, "`worse` is not a JSON value; text must stand in double quotes"),
        ("a", 3, "the key `text` is missing; there is `a`, `b` (to use another key: nanothink data import)"),
        ("a", 4, "the key `text` is missing; there is `a`, `b` (to use another key: nanothink data import)"),
        ("b", 1, "the key `text` is missing; there is `c` (to use another key: nanothink data import)"),
        ("a", 5, "the value of `text` is odd"),
        ("a", 6, "the value of `id` is odd"),
        ("a", 7, "byte 0xff is not valid UTF-8 here"),
        ("a", 8, "byte 0xed is not valid UTF-8 here"),
        ("a", 9, "a comma or '}' is due, found ';'"),
        ("a", 10, "a comma or ']' is due, found U+00E9"),
    )
    assert [group.count for group in tally.groups] == [2, 2, 2, 2, 1, 1, 1]
    assert len(tally) == 11
    assert [problem.line for problem in tally.named()] == [1, 2, 3, 4, 1, *range(5, 11)]


def test_all_are_counted_and_the_first_named() -> None:
    tally = Problems()
    for line in range(1, 1001):
        for reason in ("first", "second"):
            tally.add(Problem(f"{line % 2}.jsonl", line, 1, reason))
    first, second = tally.groups
    assert (first.count, second.count, len(tally)) == (1000, 1000, 2000)
    assert first.n_files == 1000  # as often as the file changes, which goes through files in turn
    assert len(tally.named()) == 2 * PLACES
    assert [problem.reason for problem in tally.named()[:4]] == ["first", "second"] * 2
    assert [(problem.line, problem.reason) for problem in tally.some(3)] == [
        *((2, "first"), (1, "first"), (1, "second"))
    ]


def test_lines_are_named_in_stretches() -> None:
    lines = [*range(1, 31), 40, 42, 43]
    tally = found(*(("a", line, "r") for line in lines), ("b", 0, "r"), ("c", 7, "r"))
    (group,) = tally.groups
    assert group.where() == "a: 1-30, 40, 42-43; b; c: 7"
    assert group.n_files == 3
    odd = found(*(("a", line, "r") for line in range(1, 101, 2)))
    assert odd.groups[0].where().endswith("37, 39; and 30 more")


def test_memory_does_not_grow_with_kinds_or_reasons() -> None:
    tally = Problems()
    letters = "abcdefghijklmnopqrstuvwxyz"
    for i in range(20_000):
        word = "".join(letters[i // 26**k % 26] for k in range(4))
        tally.add(Problem("a", i, 1, word))
    assert len(tally) == 20_000
    assert len(tally.groups) == 101
    assert tally.groups[0].count == 19_900  # the kinds beyond the hundredth, all together
    assert len(tally._by_reason) <= 1000
    assert not tally.groups[0].is_uniform


def test_kept_counts_come_back() -> None:
    """As the bad lines of tokenised files do: counts, and some of the places."""
    tally = found(*(("a", line, "r") for line in range(1, 9)), ("a", 9, "s"))
    again = Problems()
    again.extend([(count, named[:2]) for count, named in tally.named_groups()])
    assert [(group.reason, group.count, group.where()) for group in again.groups] == [
        ("r", 8, "a: 1-2; and 6 more"),
        ("s", 1, "a: 9"),
    ]
    assert again.sentence() == "r (8, the first at a:1:1); s (a:9:1)"


def test_the_hint_moves_the_file_out_of_its_domain_and_imports_it() -> None:
    tally = Problems()
    for file in ("data/my code/a.jsonl", "data/my code/b.jsonl"):
        tally.add(Problem(file, 1, 1, "the key `text` is missing", "content"))
    assert tally.groups[0].hint == (
        "If `content` is all of the text, move the file away and import it (and so each of 2 files): "
        "mkdir -p 'data-originals/my code' && mv -n 'data/my code/a.jsonl' 'data-originals/my code'/ && "
        "nanothink data import 'data-originals/my code/a.jsonl' --domain 'my code' --text-field content "
        "--data-dir data"
    )
