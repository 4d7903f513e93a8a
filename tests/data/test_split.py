"""Which documents train, validate and test, and what is known to have been trained on."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanothink.data.sides import VAL, assign_sides
from nanothink.data.split import SplitRule, text_key
from nanothink.data.token_files import DOCUMENT


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


def test_the_key_of_a_text_never_changes():
    # Written down: a change of hash would move documents between the sides of every existing run.
    assert text_key("NanoThink") == 13148234440110152715
    assert text_key("é") == 3394012004367669963


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


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9]))
def test_a_domain_of_several_texts_has_both_sides(sizes, val_split):
    keys = {f"d{i}": draw(size, f"{i}/") for i, size in enumerate(sizes)}
    for side in assign(keys, val_split).values():
        assert side.any()
        assert not side.all()


def test_the_text_moved_is_the_one_of_smallest_or_largest_hash():
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


def test_growth_moves_a_text_from_validation_to_training_only():
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
