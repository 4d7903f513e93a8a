"""The split: the side (training, validation or test) of each document of a corpus.

1. Documents that belong together form a group: those of the same ``group``; else of the same ``source``,
   unless the whole domain has that source; else copies of one text.
2. The side of a group follows from the hash of its key, as a fraction h of 2**64: validation if h <
   val_split, test if h >= 1 - test_split, else training. So a corpus may grow or be reordered, and another
   val_split moves only the groups between the old and the new value.
3. A text on the training side in one domain is on it in all; otherwise the same holds for validation.
4. If the sides of a domain are too uneven, whole groups are moved (``_Settler``). A domain of one group
   validates on its last documents, so that only one boundary is shared; a domain of one text has that text
   cut.
5. Before all other rules: what a model was trained on stays on the training side, and what it held out stays
   on its side.

Texts and groups are numbered, and each step is a few numpy operations on all of them. Only domains that need
a move are handled one by one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanothink.data.split import (
    NOTHING,
    NOTHING_HELD_OUT,
    HeldOutText,
    Keys,
    SplitRule,
    TrainedText,
    hashed,
)

Sides = NDArray[np.int8]
Int64 = NDArray[np.int64]

TRAIN, VAL, TEST = 0, 1, 2
CUT = 3
"""Not a side: the only text of some domain, divided among the sides in every domain that holds it."""

_FREE = -1


@dataclass(frozen=True)
class Assignment:
    sides: dict[str, Sides]
    """TRAIN, VAL, TEST or CUT of each document, by domain."""
    trained_groups: Keys
    """Keys of the named groups on the training side, sorted."""
    cut: dict[int, str]
    """Key of each text to cut, and a domain that holds it; one that holds no other, if there is one."""


def assign_sides(
    documents: Mapping[str, NDArray[Any]],
    rule: SplitRule | None,
    trained: TrainedText = NOTHING,
    held_out: HeldOutText = NOTHING_HELD_OUT,
) -> Assignment:
    """Assign the documents of a corpus to the sides; see the top of this file.

    Args:
        documents: rows with ``key``, ``group`` and ``n_bytes`` (token_files.DOCUMENT has them), in the order
            of the domain, copies included.
        rule: None puts all documents on the training side.

    Domains that share texts may have no solution (three domains, each with two of three texts). Copies agree
    even then, and a domain lacks one side.
    """
    names = sorted(name for name in documents if len(documents[name]))
    if not names:
        return Assignment({name: np.empty(0, np.int8) for name in documents}, np.empty(0, np.uint64), {})
    table = _Table([documents[name] for name in names])
    cut: dict[int, str] = {}
    if rule is None:
        sides = np.full(len(table.keys), TRAIN, np.int8)
        unit_sides = np.full(len(table.unit_keys), TRAIN, np.int8)
    else:
        settler = _Settler(table, rule, trained, held_out)
        settler.settle()
        sides, unit_sides = settler.text_sides[table.texts], settler.unit_sides
        sides[settler.is_cut[table.texts]] = CUT
        for only in (False, True):  # the latter overrides
            places = np.flatnonzero((sides == CUT) & (table.one_text[table.domains] == only))
            keys, first = np.unique(table.keys[places], return_index=True)
            domains = table.domains[places[first]]
            cut |= {int(key): names[domain] for key, domain in zip(keys, domains, strict=True)}
    parts = dict(zip(names, np.split(sides, table.starts[1:]), strict=True))
    return Assignment(
        {name: parts.get(name, np.empty(0, np.int8)) for name in documents},
        table.unit_keys[table.is_named & (unit_sides == TRAIN)],
        cut,
    )


def group_keys(rows: NDArray[Any], sources_count: bool) -> Keys:
    """Key of the group of each document: the named group, or the text itself."""
    return np.where(_named(rows["group"], sources_count), rows["group"], rows["key"])


def sources_count(rows: NDArray[Any]) -> bool:
    """Return whether sources form groups: not if all documents of the domain have the same one."""
    group = rows["group"]
    return not (len(group) and group[0] and group[0] % 2 == 0 and bool((group == group[0]).all()))


def _named(group: Keys, source_counts: bool | NDArray[np.bool_]) -> NDArray[np.bool_]:
    named: NDArray[np.bool_] = (group % 2 == 1) | ((group != 0) & source_counts)
    return named


class _Table:
    """All documents, domain by domain; texts and groups ("units") are numbered by their sorted keys."""

    def __init__(self, domains: list[NDArray[Any]]) -> None:
        counts = np.array([len(rows) for rows in domains])
        self.starts: Int64 = np.cumsum(counts) - counts
        self.domains: Int64 = np.repeat(np.arange(len(domains)), counts)
        self.keys: Keys = np.concatenate([rows["key"] for rows in domains])
        self.sizes: Int64 = np.concatenate([rows["n_bytes"] for rows in domains])
        group = np.concatenate([rows["group"] for rows in domains])
        first = group[self.starts]
        one_source = self._all_alike(group) & (first != 0) & (first % 2 == 0)
        named = _named(group, ~one_source[self.domains])
        self.text_keys, self.texts = np.unique(self.keys, return_inverse=True)
        self.unit_keys, self.units = np.unique(np.where(named, group, self.keys), return_inverse=True)
        self.is_named = np.zeros(len(self.unit_keys), np.bool_)
        self.is_named[self.units[named]] = True
        self.one_text = self._all_alike(self.texts)
        self.one_unit = self._all_alike(self.units) & ~self.one_text

    def has_three_units(self) -> NDArray[np.bool_]:
        """Per domain: whether it has three units or more."""
        others = self.units != self.units[self.starts][self.domains]
        places = np.where(others, np.arange(len(others)), len(others) - 1)
        second = self.units[np.minimum.reduceat(places, self.starts)]
        return np.logical_or.reduceat(others & (self.units != second[self.domains]), self.starts)

    def _all_alike(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Per domain: whether all its documents have the same value."""
        return np.logical_and.reduceat(values == values[self.starts][self.domains], self.starts)

    def of_domain(self, domain: int) -> slice:
        last = domain + 1 == len(self.starts)
        return slice(int(self.starts[domain]), len(self.keys) if last else int(self.starts[domain + 1]))


class _Settler:
    """Assigns units to sides by the rule, then moves units in domains whose sides are too uneven.

    In a domain of two units or more, training and validation must not be empty, validation must have at most
    half of the bytes (or ``val_split`` if that is more), and all held-out text at most half (or ``val_split``
    plus ``test_split``). Where the rule does not give that:

    1. Validation keeps its units by ascending hash as long as they fit, and the others train; then the test
       side does the same by descending hash.
    2. If validation is empty, the unit whose size is nearest to ``val_split`` of the bytes moves there, the
       lowest hash first. Then the same for an empty test side, in a domain of three units or more.

    Groups that a model was trained on are moved last. A move that would empty a side of another domain is not
    made, except that validation may take from the test side.
    """

    def __init__(self, table: _Table, rule: SplitRule, trained: TrainedText, held_out: HeldOutText) -> None:
        self.table, self.rule = table, rule
        self.hashes = hashed(table.unit_keys, rule.seed)
        self.is_trained = table.is_named & np.isin(table.unit_keys, trained.groups)
        self.is_trained[table.units[table.one_unit[table.domains]]] = True
        self.unit_sides = np.where(self.is_trained, TRAIN, _dealt(self.hashes, rule)).astype(np.int8)

        # A text that was cut once stays cut, also where its domain has others.
        self.is_cut = np.isin(table.text_keys, np.array(list(trained.heads), np.uint64))
        self.is_cut[table.texts[table.starts[table.one_text]]] = True
        self.is_cut &= ~np.isin(table.text_keys, trained.keys)
        self.forced = np.full(len(table.text_keys), _FREE, np.int8)
        for side, keys in ((TEST, held_out.test), (VAL, held_out.val)):
            self.forced[np.isin(table.text_keys, keys)] = side
        self.forced[self.is_cut | trained.holds(table.text_keys)] = TRAIN
        for side in (TEST, VAL):
            held = np.zeros(len(table.unit_keys), np.bool_)
            held[table.units[self.forced[table.texts] == side]] = True
            self.unit_sides[held & ~self.is_trained] = side
        for domain in np.flatnonzero(table.one_unit):
            self._hold_out_the_end(table.of_domain(int(domain)))

        self.text_sides = np.full(len(table.text_keys), TEST, np.int8)
        for side in (VAL, TRAIN):  # in that order: training wins
            self.text_sides[table.texts[self.unit_sides[table.units] == side]] = side
        self.text_sides = np.where(self.forced == _FREE, self.text_sides, self.forced)

        n_domains = len(table.starts)
        self.bytes: Int64 = np.zeros((n_domains, 3), np.int64)
        """(domains, sides)"""
        for side in (TRAIN, VAL, TEST):
            here = self.text_sides[table.texts] == side
            self.bytes[:, side] = np.bincount(table.domains[here], table.sizes[here], n_domains)
        self.several = ~(table.one_text | table.one_unit)
        self.wants_test = self.several & table.has_three_units() & (rule.test_split > 0)
        totals = self.bytes.sum(1)
        self.filled = np.zeros((n_domains, 3), np.bool_)
        self.most_val = max(0.5, rule.val_split) * totals
        self.most_held_out = max(0.5, rule.val_split + rule.test_split) * totals

    def _hold_out_the_end(self, documents: slice) -> None:
        """Fix the sides of a domain of one unit: the last texts validate, those before them test, the rest
        train."""
        texts, first, number = np.unique(self.table.texts[documents], return_index=True, return_inverse=True)
        order = np.argsort(first)
        sizes, texts = np.bincount(number, self.table.sizes[documents])[order], texts[order]
        forced, total = self.forced[texts], sizes.sum()
        kept = int(not (forced == TRAIN).any())  # for training
        texts, free = texts[forced == _FREE], sizes[forced == _FREE]
        end = len(texts)
        if end > kept and free[-1] > max(0.5, self.rule.val_split) * total and not (forced == VAL).any():
            # Most of the domain would validate: its last text is cut, as if it were the only one.
            self.is_cut[texts[-1]] = True
            self.forced[texts] = TRAIN
            return
        for side, fraction in ((VAL, self.rule.val_split), (TEST, self.rule.test_split)):
            given = sizes[forced == side].sum()  # by another such domain
            least = int(fraction > 0 and not given)
            held = np.concatenate(([0.0], np.cumsum(free[kept:end][::-1])))[least:]
            n = least + int(np.argmin(np.abs(held + given - fraction * total))) if len(held) else 0
            self.forced[texts[end - n : end]] = side
            end -= n
        self.forced[texts[:end]] = TRAIN

    def settle(self) -> None:
        waiting = deque(np.flatnonzero(self._uneven(np.arange(len(self.several)))).tolist())
        if not waiting:
            return
        table = self.table
        self._documents_of_unit, self._documents_of_text = _Index(table.units), _Index(table.texts)
        pairs = np.sort(table.texts * np.int64(len(table.unit_keys)) + table.units)
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]
        self._pair_units = pairs % len(table.unit_keys)
        self._pairs_of_text = _Index(pairs // len(table.unit_keys))
        # Every domain is given each side at most once, and between that the held-out sides only shrink.
        queued = set(waiting)
        while waiting:
            domain = waiting.popleft()
            queued.discard(domain)
            touched = np.array(sorted(self._settle_one(domain) - queued - {domain}), np.int64)
            again = touched[self._uneven(touched)].tolist()
            waiting.extend(again)
            queued.update(again)

    def _uneven(self, domains: Int64) -> NDArray[np.bool_]:
        train, val, test = self.bytes[domains].T
        found: NDArray[np.bool_] = self.several[domains] & (
            (train == 0)
            | (val == 0)
            | (val > self.most_val[domains])
            | (val + test > self.most_held_out[domains])
            | ((test == 0) & self.wants_test[domains])
        )
        return found

    def _settle_one(self, domain: int) -> set[int]:
        """Make the moves that one domain needs; return the domains whose sides changed."""
        touched = self._shrink(domain, VAL, self.most_val[domain])
        if not self.bytes[domain, VAL]:
            touched |= self._fill(domain, VAL, self.most_val[domain])
        if not self.bytes[domain, VAL]:  # two units, one of them large or for testing
            touched |= self._shrink(domain, TEST, 0.0)
            touched |= self._fill(domain, VAL, self.most_val[domain]) or self._fill(domain, VAL, math.inf)
        room = self.most_held_out[domain] - self.bytes[domain, VAL]
        touched |= self._shrink(domain, TEST, room)
        if not self.bytes[domain, TEST] and self.wants_test[domain] and not self.filled[domain, TEST]:
            touched |= self._fill(domain, TEST, room)
        return touched

    def _shrink(self, domain: int, side: int, most: float) -> set[int]:
        if self.bytes[domain, side] <= most:
            return set()
        texts, sizes, units, number = self._documents(domain)
        here = (self.text_sides[texts] == side) & (self.forced[texts] == _FREE)
        held = np.bincount(number, sizes * (here & (self.unit_sides[units[number]] == side)), len(units))
        kept = self.bytes[domain, side] - held.sum()
        order = np.argsort(self.hashes[units] if side == VAL else ~self.hashes[units])
        order = order[(held > 0)[order]]
        own = None if self.filled[domain, side] else domain
        staying, touched = [], set[int]()
        for i in order:
            if kept + held[i] <= most or (changed := self._move(int(units[i]), TRAIN, own)) is None:
                kept += held[i]
                staying.append(i)
            else:
                touched |= changed
        for i in reversed(staying):  # where one had to stay for another domain's sake
            if self.bytes[domain, side] > most:
                touched |= self._move(int(units[i]), TRAIN) or set()
        return touched

    def _fill(self, domain: int, side: int, room: float) -> set[int]:
        texts, sizes, units, number = self._documents(domain)
        own = self.unit_sides[units]
        # A text follows its unit to a side if no other unit holds it on a side that wins.
        distinct, place = np.unique(texts, return_inverse=True)
        pairs, starts = self._pairs_of_text.members(distinct)
        winning = np.add.reduceat(self.unit_sides[self._pair_units[pairs]] < side, starts, dtype=np.int64)
        follows = (winning[place] == (own[number] < side)) & (self.forced[texts] == _FREE)
        gains = np.bincount(number, sizes * follows, len(units))
        fraction = self.rule.val_split if side == VAL else self.rule.test_split
        distance = np.abs(gains - fraction * self.bytes[domain].sum())
        order = np.lexsort((self.hashes[units], distance, own != TRAIN, self.is_trained[units]))
        possible = (gains > 0) & (gains <= room) & ((own == TRAIN) | (own > side))
        for i in order[possible[order]]:
            touched = self._move(int(units[i]), side)
            if touched is not None:
                self.filled[domain, side] = True
                return touched
        return set()

    def _documents(self, domain: int) -> tuple[Int64, Int64, Int64, Int64]:
        """Text and size of each document, the domain's units, and the index of each document's unit."""
        here = self.table.of_domain(domain)
        units, number = np.unique(self.table.units[here], return_inverse=True)
        return self.table.texts[here], self.table.sizes[here], units, number

    def _move(self, unit: int, side: int, may_empty: int | None = None) -> set[int] | None:
        """Move a unit and the texts that follow it; return the domains changed, or None if it is not made."""
        before = self.unit_sides[unit]
        self.unit_sides[unit] = side
        texts = np.unique(self.table.texts[self._documents_of_unit.members(np.array([unit]))[0]])
        texts = texts[self.forced[texts] == _FREE]
        if not len(texts):
            return set()
        pairs, starts = self._pairs_of_text.members(texts)
        now = np.minimum.reduceat(self.unit_sides[self._pair_units[pairs]], starts)
        documents, starts = self._documents_of_text.members(texts)
        counts = np.diff(np.append(starts, len(documents)))
        where, sizes = self.table.domains[documents], self.table.sizes[documents]
        domains = np.unique(where)
        kept = self.bytes[domains]
        np.subtract.at(self.bytes, (where, np.repeat(self.text_sides[texts], counts)), sizes)
        np.add.at(self.bytes, (where, np.repeat(now, counts)), sizes)
        lost = (kept > 0) & (self.bytes[domains] == 0)
        lost[:, TEST] &= side != VAL
        if lost[domains != may_empty].any():
            self.bytes[domains] = kept
            self.unit_sides[unit] = before
            return None
        self.text_sides[texts] = now
        return set(domains.tolist())


def _dealt(hashes: Keys, rule: SplitRule) -> Sides:
    """Side of each hash by the rule alone."""
    sides = np.full(len(hashes), TRAIN, np.int8)
    if rule.test_split:
        sides[hashes >= np.uint64(2**64 - math.ceil(rule.test_split * 2.0**64))] = TEST
    sides[hashes < np.uint64(min(math.ceil(rule.val_split * 2.0**64), 2**64 - 1))] = VAL
    return sides


class _Index:
    """Index from the numbers 0, 1, ... to their places in an array."""

    def __init__(self, numbers: Int64) -> None:
        self._order = np.argsort(numbers, kind="stable")
        counts = np.bincount(numbers)
        self._counts, self._starts = counts, np.cumsum(counts) - counts

    def members(self, numbers: Int64) -> tuple[Int64, Int64]:
        """Places of these numbers, concatenated, and where those of each number begin."""
        counts = self._counts[numbers]
        starts = np.cumsum(counts) - counts
        steps = np.arange(counts.sum()) - np.repeat(starts - self._starts[numbers], counts)
        return self._order[steps], starts
