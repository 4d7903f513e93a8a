"""Which documents train, validate and test, and what is known to have been trained on."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanothink.data.sides import CUT, TEST, TRAIN, VAL, assign_sides, group_keys, sources_count
from nanothink.data.split import (
    HeldOutText,
    SplitRule,
    TrainedText,
    group_key,
    hashed,
    text_key,
)
from nanothink.data.token_files import DOCUMENT


def rows_of(*documents: tuple[str, str | None, int]) -> np.ndarray:
    """Rows of documents given as (text, group, bytes); a group that begins with "source:" is a source."""
    rows = np.zeros(len(documents), DOCUMENT)
    for row, (text, group, n_bytes) in zip(rows, documents, strict=True):
        name = group.removeprefix("source:") if group else None
        is_source = group is not None and group.startswith("source:")
        row["key"], row["n_bytes"] = text_key(text), n_bytes
        row["group"] = group_key(None, name) if is_source else group_key(name, None)
    return rows


def fractions(rows: np.ndarray, sides: np.ndarray) -> dict[int, float]:
    sizes = rows["n_bytes"].astype(float)
    return {side: float(sizes[sides == side].sum() / sizes.sum()) for side in (TRAIN, VAL, TEST)}


def assign(keys: Mapping[str, np.ndarray], val_split: float) -> dict[str, np.ndarray]:
    """Masks of the documents that validate, where each text is a group of its own and all are of one size."""
    rows = {}
    for name, own in keys.items():
        rows[name] = np.zeros(len(own), DOCUMENT)
        rows[name]["key"], rows[name]["n_bytes"] = own, 10
    return {name: sides == VAL for name, sides in assign_sides(rows, SplitRule(val_split)).sides.items()}


def keys_of(*texts: str) -> np.ndarray:
    return np.array([text_key(text) for text in texts], np.uint64)


def draw(n: int, prefix: str = "t") -> np.ndarray:
    return keys_of(*[f"{prefix}{i}" for i in range(n)])


def test_the_rule_never_changes():
    drawn = assign({"a": draw(40)}, 0.1)["a"]
    assert np.flatnonzero(drawn).tolist() == [5, 21, 26, 30, 32]


def test_the_rule_is_the_published_hash():
    def splitmix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    assert splitmix64(0) == 0xE220A8397B1DCDAF  # first output of the reference program at seed 0
    keys = draw(300)
    expected = [splitmix64(int(key) ^ splitmix64(42)) / 2**64 < 0.3 for key in keys]
    assert assign({"a": keys}, 0.3)["a"].tolist() == expected


@pytest.mark.parametrize("val_split", [0.01, 0.1, 0.5])
def test_the_asked_for_fraction_validates(val_split):
    n = 20_000
    fraction = assign({"a": draw(n)}, val_split)["a"].mean()
    assert abs(fraction - val_split) < 4 * (val_split * (1 - val_split) / n) ** 0.5


def test_growth_and_reordering_move_no_document():
    keys = draw(1000)
    before = assign({"a": keys[:300], "b": keys[300:500]}, 0.1)
    order = np.random.default_rng(0).permutation(500)
    grown = np.concatenate([keys[500:], keys[:500][order]])
    after = assign({"z": grown, "a": keys[:0]}, 0.1)
    side_of = dict(zip(grown.tolist(), after["z"].tolist(), strict=True))
    assert [side_of[key] for key in keys[:300].tolist()] == before["a"].tolist()
    assert [side_of[key] for key in keys[300:500].tolist()] == before["b"].tolist()
    assert after["a"].shape == (0,)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(0, 9), max_size=8), max_size=6),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9]),
    st.randoms(),
)
def test_copies_agree_whatever_the_domains_share(content, val_split, rng):
    keys = {name: keys_of(*map(str, texts)) for name, texts in content.items()}
    sides = assign(keys, val_split)
    assert {name: side.shape for name, side in sides.items()} == {n: k.shape for n, k in keys.items()}
    side_of: dict[int, bool] = {}
    for name in keys:
        for key, side in zip(keys[name].tolist(), sides[name].tolist(), strict=True):
            assert side_of.setdefault(key, side) == side
    shuffled = {name: list(range(len(own))) for name, own in keys.items()}
    for order in shuffled.values():
        rng.shuffle(order)
    names = list(keys)
    rng.shuffle(names)
    again = assign({name: keys[name][shuffled[name]] for name in names}, val_split)
    for name in names:
        assert again[name].tolist() == sides[name][shuffled[name]].tolist()


def test_of_texts_of_one_size_the_one_of_smallest_or_largest_hash_is_moved():
    keys = draw(50)
    order = [int(np.flatnonzero(assign({"a": keys}, v)["a"])[0]) for v in (1e-12, 1 - 1e-12)]
    validating = assign({"a": keys}, 1e-12)["a"]
    training = ~assign({"a": keys}, 1 - 1e-12)["a"]
    assert validating.sum() == training.sum() == 1
    # The first text that joins validation as the fraction grows, and the last that leaves training.
    for val_split in (0.05, 0.5, 0.95):
        drawn = assign({"a": keys}, val_split)["a"]
        assert drawn[order[0]]
        assert not drawn[np.flatnonzero(training)[0]]


def test_growth_of_texts_of_one_size_moves_them_from_validation_to_training_only():
    for seed in range(40):
        keys = draw(30, f"{seed}/")
        previous = assign({"a": keys[:2]}, 0.02)["a"]
        for n in range(3, 31):
            grown = assign({"a": keys[:n]}, 0.02)["a"]
            # (No pair of these seeds is drawn for validation as a whole, the one way back.)
            assert not (grown[: n - 1] & ~previous).any()
            previous = grown


def test_a_single_text_trains_copies_or_not():
    for i in range(30):
        key = keys_of(str(i))
        sides = assign({"a": np.repeat(key, 3), "b": np.concatenate([key, draw(5, "other")])}, 0.5)
        assert not sides["a"].any()
        assert not sides["b"][0]
        assert sides["b"].any()


def test_domains_that_share_texts_are_both_served_when_they_can_be():
    for seed in range(200):
        rng = random.Random(seed)
        one, two, three = (str(rng.random()) for _ in range(3))
        for val_split in (0.02, 0.5, 0.98):
            sides = assign({"a": keys_of(one, two), "b": keys_of(one, three)}, val_split)
            assert sides["a"].tolist() in ([True, False], [False, True])
            assert sides["b"].tolist() in ([True, False], [False, True])


# Documents that belong together


def test_a_group_is_on_one_side_and_changes_with_the_fraction_as_one() -> None:
    rows = rows_of(*[(f"t{i}", f"g{i % 200}", 10 + i % 7) for i in range(1000)])
    before = np.zeros(200, np.bool_)
    for val_split in (0.05, 0.1, 0.2, 0.4):
        validates = assign_sides({"d": rows}, SplitRule(val_split)).sides["d"] == VAL
        of_group = [set(validates[g::200].tolist()) for g in range(200)]
        assert all(len(sides) == 1 for sides in of_group)
        now = np.array([sides.pop() for sides in of_group])
        assert not (before & ~now).any(), "a larger fraction takes nothing from validation"
        before = now


def test_a_source_is_a_group_unless_all_of_a_domain_is_of_it() -> None:
    several = rows_of(*[(f"t{i}", f"source:s{i % 20}", 10) for i in range(400)])
    sides = assign_sides({"d": several}, SplitRule(0.2)).sides["d"]
    assert all(len(set(sides[s::20])) == 1 for s in range(20))
    assert len(np.unique(group_keys(several, sources_count(several)))) == 20

    one = rows_of(*[(f"u{i}", "source:s1", 10) for i in range(400)])
    alone = rows_of(*[(f"u{i}", None, 10) for i in range(400)])
    by_text = assign_sides({"d": alone}, SplitRule(0.2)).sides["d"]
    assert assign_sides({"d": one}, SplitRule(0.2)).sides["d"].tolist() == by_text.tolist()
    assert not sources_count(one)
    # In another domain the same source may be one of several.
    both = assign_sides({"d": one, "e": several}, SplitRule(0.2)).sides
    assert both["d"].tolist() == by_text.tolist()
    assert both["e"].tolist() == sides.tolist()


def test_a_group_that_is_named_counts_though_the_source_says_more() -> None:
    assert group_key("chapter", "book") == group_key("chapter", "another book")
    rows = rows_of(*[(f"t{i}", "the only book", 10) for i in range(10)])
    sides = assign_sides({"d": rows}, SplitRule(0.2)).sides["d"].tolist()
    assert sides == [TRAIN] * 8 + [VAL] * 2


def test_copies_in_several_groups_train_if_one_of_them_does() -> None:
    rows = rows_of(*[(f"t{i}", f"g{i % 40}", 10) for i in range(200)])
    plain = assign_sides({"d": rows}, SplitRule(0.3, 0.3)).sides["d"]
    groups = {side: [g for g in range(40) if plain[g] == side] for side in (TRAIN, VAL, TEST)}
    assert all(len(own) >= 2 for own in groups.values()), groups
    for one, other, expected in (
        (TRAIN, VAL, TRAIN),
        (TRAIN, TEST, TRAIN),
        (VAL, TEST, VAL),
        (TEST, TEST, TEST),
    ):
        pair = (groups[one][0], groups[other][1])
        more = rows_of(*[("boilerplate", f"g{g}", 1) for g in pair])
        sides = assign_sides({"d": np.concatenate([rows, more])}, SplitRule(0.3, 0.3)).sides["d"]
        assert sides[-2:].tolist() == [expected] * 2
        assert sides[:-2].tolist() == plain.tolist()
        elsewhere = assign_sides({"d": rows, "e": np.concatenate([more, rows])}, SplitRule(0.3, 0.3)).sides
        assert elsewhere["e"][:2].tolist() == [expected] * 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 400)), min_size=2, max_size=30),
    st.sampled_from([1e-9, 0.02, 0.1, 0.3, 0.5, 0.7]),
    st.sampled_from([0.0, 0.1, 0.25]),
)
def test_a_domain_of_several_groups_has_both_sides_and_validates_on_half_at_most(
    drawn: list[tuple[int, int]], val_split: float, test_split: float
) -> None:
    rows = rows_of(*[(f"t{i}", f"g{group}", size) for i, (group, size) in enumerate(drawn)])
    groups = [group for group, _ in drawn]
    sides = assign_sides({"d": rows}, SplitRule(val_split, test_split)).sides["d"]
    if len(set(groups)) == 1:
        assert sorted(sides.tolist(), key=[TRAIN, TEST, VAL, CUT].index) == sides.tolist()
        return
    share = fractions(rows, sides)
    assert share[TRAIN] > 0
    assert 0 < share[VAL] <= max(0.5, val_split)
    assert share[VAL] + share[TEST] <= max(0.5, val_split + test_split)
    assert test_split or not share[TEST]
    for group in set(groups):
        assert len({side for side, own in zip(sides, groups, strict=True) if own == group}) == 1
    again = assign_sides({"d": rows[::-1]}, SplitRule(val_split, test_split)).sides["d"]
    assert again[::-1].tolist() == sides.tolist()


def test_the_group_moved_is_the_one_of_the_size_asked_for() -> None:
    sizes = {"huge": 700, "large": 180, "right": 80, "small": 30, "tiny": 10}
    for val_split, chosen in ((0.09, "right"), (0.17, "large"), (0.01, "tiny"), (0.025, "small")):
        for ending in range(100):  # names of which the rule itself draws none
            keys = np.array([group_key(f"{name}{ending}", None) for name in sizes], np.uint64)
            if (hashed(keys, SplitRule(val_split).seed) >= np.uint64(val_split * 2**64)).all():
                break
        rows = rows_of(
            *[(f"{name} {i}", f"{name}{ending}", n) for name, n in sizes.items() for i in range(2)]
        )
        sides = assign_sides({"d": rows}, SplitRule(val_split)).sides["d"]
        assert sides.tolist() == [VAL if name == chosen else TRAIN for name in sizes for _ in range(2)]


def test_a_book_in_pieces_validates_on_its_end() -> None:
    rows = rows_of(*[(f"piece {i}", "book", 100 + i % 3) for i in range(200)])
    sides = assign_sides({"d": rows}, SplitRule(0.1)).sides["d"]
    assert sides.tolist() == [TRAIN] * 180 + [VAL] * 20
    three = assign_sides({"d": rows}, SplitRule(0.1, 0.2)).sides["d"]
    assert three.tolist() == [TRAIN] * 140 + [TEST] * 40 + [VAL] * 20
    two = rows_of(("a", "book", 10), ("b", "book", 90))
    # Validation would be 90 % of the text: its last piece is cut instead.
    assert assign_sides({"d": two}, SplitRule(0.1, 0.3)).sides["d"].tolist() == [TRAIN, CUT]
    halves = rows_of(("a", "book", 50), ("b", "book", 50))
    assert assign_sides({"d": halves}, SplitRule(0.1)).sides["d"].tolist() == [TRAIN, VAL]
    refrain = rows_of(*[("refrain" if i % 2 else f"verse {i}", "song", 10) for i in range(20)])
    sides = assign_sides({"d": refrain}, SplitRule(0.1)).sides["d"]
    assert sides.tolist() == [TRAIN] * 16 + [VAL, TRAIN, VAL, TRAIN]  # the refrain is heard before


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcde"),
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(1, 50)), max_size=8),
        max_size=5,
    ),
    st.sampled_from([1e-9, 0.1, 0.5, 0.8]),
    st.sampled_from([0.0, 0.15]),
    st.sets(st.integers(0, 9), max_size=4),
)
def test_copies_agree_and_nothing_trained_on_is_held_out(
    content: dict[str, list[tuple[int, int, int]]], val_split: float, test_split: float, known: set[int]
) -> None:
    """Whatever domains share, texts and groups."""
    names = ["source:x", "source:y", None, None, "g", "h"]
    documents = {
        name: rows_of(*[(str(text), names[g], n) for text, g, n in own]) for name, own in content.items()
    }
    trained = TrainedText(np.sort(np.array([text_key(str(text)) for text in known], np.uint64)))
    rule = SplitRule(val_split, test_split)
    found = assign_sides(documents, rule, trained)
    side_of: dict[int, int] = {}
    for name, rows in documents.items():
        assert len(found.sides[name]) == len(rows)
        for key, side in zip(rows["key"].tolist(), found.sides[name].tolist(), strict=True):
            assert side_of.setdefault(key, side) == side
    assert all(side_of.get(text_key(str(text)), TRAIN) in (TRAIN, CUT) for text in known)
    assert all(found.cut[key] in content for key, side in side_of.items() if side == CUT)


# What was trained on


def known_from(documents: Mapping[str, np.ndarray], rule: SplitRule) -> tuple[TrainedText, HeldOutText]:
    """What a checkpoint says of a run on these documents."""
    found = assign_sides(documents, rule)
    train, val, test = (
        np.unique(np.concatenate([rows["key"][found.sides[d] == side] for d, rows in documents.items()]))
        for side in (TRAIN, VAL, TEST)
    )
    return TrainedText(train, {}, found.trained_groups), HeldOutText(val, test)


def test_a_resumed_run_splits_the_same_data_in_the_same_way() -> None:
    for seed in range(60):
        rng = random.Random(seed)

        def document(rng: random.Random = rng) -> tuple[str, str | None, int]:
            return f"t{rng.randrange(40)}", rng.choice([None, f"g{rng.randrange(5)}"]), rng.randrange(1, 90)

        documents = {f"d{d}": rows_of(*[document() for _ in range(rng.randrange(2, 12))]) for d in range(4)}
        documents["book"] = rows_of(*[(f"piece {seed} {i}", "book", 10) for i in range(30)])
        rule = SplitRule(0.15, rng.choice([0.0, 0.2]))
        first = assign_sides(documents, rule)
        again = assign_sides(documents, rule, *known_from(documents, rule))
        for domain, sides in first.sides.items():
            assert again.sides[domain].tolist() == sides.tolist()
        assert again.trained_groups.tolist() == first.trained_groups.tolist()


def test_another_fraction_on_resume_never_holds_out_what_was_trained_on() -> None:
    documents = {
        "texts": rows_of(*[(f"t{i}", None, 10) for i in range(300)]),
        "groups": rows_of(*[(f"u{i}", f"g{i % 30}", 10) for i in range(300)]),
        "book": rows_of(*[(f"piece {i}", "book", 10) for i in range(100)]),
    }
    trained, _ = known_from(documents, SplitRule(0.1))
    before = {name: sides == TRAIN for name, sides in assign_sides(documents, SplitRule(0.1)).sides.items()}
    # The corpus grows, also by documents of groups that were trained on.
    more = {
        "texts": rows_of(*[(f"new t{i}", None, 10) for i in range(300)]),
        "groups": rows_of(*[(f"new u{i}", f"g{i % 60}", 10) for i in range(300)]),
        "book": rows_of(*[(f"new piece {i}", "book", 10) for i in range(100)]),
    }
    grown = {name: np.concatenate([rows, more[name]]) for name, rows in documents.items()}
    after = assign_sides(grown, SplitRule(0.4), trained).sides
    for name, trained_before in before.items():
        assert (after[name][: len(trained_before)][trained_before] == TRAIN).all()
        assert (after[name] == VAL).any()
    of_group = [set(after["groups"][300:][g::60]) for g in range(60)]
    assert all(sides == {TRAIN} for g, sides in enumerate(of_group[:30]) if before["groups"][g])
    assert {VAL} in of_group[30:]


def test_all_of_a_domain_was_trained_on() -> None:
    rows = rows_of(*[(f"t{i}", None, 10) for i in range(20)])
    everything = TrainedText(np.unique(rows["key"]))
    assert (assign_sides({"d": rows}, SplitRule(0.3), everything).sides["d"] == TRAIN).all()


# Size


def test_thousands_of_domains_take_seconds() -> None:
    """Most of these need a move; looking at all domains for each of them took minutes."""
    rng = np.random.default_rng(0)
    documents = {}
    for d in range(3000):
        rows = documents[f"d{d}"] = np.zeros(8, DOCUMENT)
        rows["key"] = rng.integers(2**63, size=8)
        rows["key"][:2] = rng.integers(500, size=2)  # and share texts
        rows["n_bytes"] = rng.integers(10, 1000, size=8)
    begun = time.process_time()
    found = assign_sides(documents, SplitRule(0.1))
    assert time.process_time() - begun < 10
    assert all((sides == TRAIN).any() and (sides == VAL).any() for sides in found.sides.values())
