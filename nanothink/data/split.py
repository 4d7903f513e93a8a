"""The rule of the split, the keys of texts and groups, and the records of what was trained on and held
out."""

from __future__ import annotations

import bisect
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanothink.config.data import SPLIT_SEED, DataConfig
from nanothink.errors import DataError

Keys = NDArray[np.uint64]

_PART_CHARS = 1 << 16
_MAX_HEADS = 1 << 17
_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class SplitRule:
    """Fractions of the validation and test sides, and the seed of the hash that assigns documents to them."""

    val_split: float
    test_split: float = 0.0
    seed: int = SPLIT_SEED

    def __post_init__(self) -> None:
        if not (0 < self.val_split < 1 and 0 <= self.test_split < 1 and self.val_split + self.test_split < 1):
            raise ValueError(
                f"val_split={self.val_split} and test_split={self.test_split} leave nothing to train on: "
                "val_split must be above 0, test_split 0 or more, and both together below 1"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"the seed of a split must be from 0 to 2^64 - 1, not {self.seed}")

    @classmethod
    def of(cls, config: DataConfig) -> SplitRule:
        """The rule of the settings."""
        return cls(config.val_split, config.test_split)

    def to_dict(self) -> dict[str, Any]:
        return {"val_split": self.val_split, "test_split": self.test_split, "seed": self.seed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SplitRule:
        """The inverse of ``to_dict``. Raises ValueError for anything else."""
        if not isinstance(values, Mapping) or values.keys() != {"val_split", "test_split", "seed"}:
            raise ValueError("a split rule has the keys val_split, test_split and seed")
        val_split, test_split, seed = values["val_split"], values["test_split"], values["seed"]
        if type(seed) is not int or not all(type(v) in (int, float) for v in (val_split, test_split)):
            raise ValueError("the fractions of a split rule are numbers, and its seed is an integer")
        return cls(float(val_split), float(test_split), seed)


def _no_keys() -> Keys:
    return np.empty(0, np.uint64)


@dataclass(frozen=True, eq=False)
class TrainedText:
    """The documents that a model was trained on, as hashes: 8 bytes per document and per named group."""

    keys: Keys = field(default_factory=_no_keys)
    """``text_key`` of each, sorted, without repeats."""
    heads: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """For a text of which only the head was trained on: its key, and the head's normalised characters."""
    groups: Keys = field(default_factory=_no_keys)
    """``group_key`` of the groups on the training side, sorted, without repeats."""
    complete: bool = True
    """False if it was also trained on unknown text, as a published model was."""

    def holds(self, keys: Keys) -> NDArray[np.bool_]:
        """Mask of the texts that were trained on, whole or in part."""
        return _among(keys, self.keys) | _among(keys, _head_keys(self.heads))

    @property
    def is_empty(self) -> bool:
        return not (len(self.keys) or self.heads or len(self.groups))

    def __or__(self, other: TrainedText) -> TrainedText:
        heads = dict(self.heads)
        for key, n_chars in other.heads.items():
            heads[key] = max(n_chars, heads.get(key, 0))
        return TrainedText(
            np.union1d(self.keys, other.keys),
            heads,
            np.union1d(self.groups, other.groups),
            self.complete and other.complete,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrainedText):
            return NotImplemented
        return (
            np.array_equal(self.keys, other.keys)
            and dict(self.heads) == dict(other.heads)
            and np.array_equal(self.groups, other.groups)
            and self.complete == other.complete
        )

    def to_state(self) -> dict[str, Any]:
        """Tensors for a checkpoint: int64 with the same bits, since torch hardly supports uint64."""
        import torch

        heads = sorted(self.heads.items())
        return {
            "keys": torch.from_numpy(self.keys.view(np.int64).copy()),
            "groups": torch.from_numpy(self.groups.view(np.int64).copy()),
            "head_keys": torch.from_numpy(np.array([key for key, _ in heads], np.uint64).view(np.int64)),
            "head_chars": torch.tensor([n_chars for _, n_chars in heads], dtype=torch.int64),
            **({} if self.complete else {"incomplete": torch.ones(1, dtype=torch.int64)}),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TrainedText:
        """The inverse of ``to_state``. Raises ValueError for anything else."""
        names = ("keys", "groups", "head_keys")
        if not isinstance(state, Mapping) or state.keys() - {"incomplete"} != {*names, "head_chars"}:
            raise ValueError(f"trained text has the parts {', '.join(names)} and head_chars")
        keys, groups, head_keys = (_sorted_keys(state[name], f"trained text: {name}") for name in names)
        chars = _bits(state["head_chars"], "trained text: head_chars").view(np.int64)
        if len(chars) != len(head_keys) or (chars < 1).any():
            raise ValueError("trained text: head_chars is not a length for each of head_keys")
        if len(chars) > _MAX_HEADS:
            raise ValueError(
                f"trained text: {len(chars):,} texts that were cut, and a domain has one at most"
            )
        heads = dict(zip(head_keys.tolist(), chars.tolist(), strict=True))
        return cls(keys, heads, groups, complete="incomplete" not in state)


def _sorted_keys(tensor: Any, what: str) -> Keys:
    keys = _bits(tensor, what)
    if (keys[1:] <= keys[:-1]).any():
        raise ValueError(f"{what} is not sorted")
    return keys


def _bits(tensor: Any, what: str) -> Keys:
    """Convert a 1-D int64 tensor to uint64, bit for bit."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int64 or tensor.dim() != 1:
        raise ValueError(f"{what} is not a row of 64-bit integers")
    bits: Keys = tensor.detach().cpu().numpy().view(np.uint64)
    return np.array(bits)


NOTHING = TrainedText()


@dataclass(frozen=True, eq=False)
class HeldOutText:
    """The held-out documents, as sorted hashes (``text_key``) without repeats; without texts that are cut.

    The rule alone does not give them: groups are moved where a side is too small or too large, and other
    groups would be moved in a part of the corpus, or once it has grown.
    """

    val: Keys = field(default_factory=_no_keys)
    test: Keys = field(default_factory=_no_keys)

    def __or__(self, other: HeldOutText) -> HeldOutText:
        """Union of both. A text that one of them validates on is not test text."""
        val = np.union1d(self.val, other.val)
        return HeldOutText(val, np.setdiff1d(np.union1d(self.test, other.test), val))

    def to_state(self) -> dict[str, Any]:
        """Tensors for a checkpoint; see ``TrainedText.to_state``."""
        import torch

        keys = {"val": self.val, "test": self.test}
        return {name: torch.from_numpy(of.view(np.int64).copy()) for name, of in keys.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> HeldOutText:
        """The inverse of ``to_state``. Raises ValueError for anything else."""
        if not isinstance(state, Mapping) or state.keys() != {"val", "test"}:
            raise ValueError("held-out text has the parts val and test")
        return cls(*(_sorted_keys(state[name], f"held-out text: {name}") for name in ("val", "test")))


NOTHING_HELD_OUT = HeldOutText()


def _among(keys: Keys, known: Keys) -> NDArray[np.bool_]:
    """``np.isin`` for sorted ``known`` keys, which it does not sort again."""
    if not len(known):
        return np.zeros(len(keys), np.bool_)
    found: NDArray[np.bool_] = known[np.searchsorted(known, keys).clip(max=len(known) - 1)] == keys
    return found


def _head_keys(heads: Mapping[int, int]) -> Keys:
    return np.array(sorted(heads), np.uint64)


def text_key(text: str) -> int:
    """64-bit key of a text: BLAKE2b of its normalised UTF-8, little-endian.

    White space (line ends, amount and kind) and the normal form of Unicode do not matter, so a file saved on
    another system holds the same texts.
    """
    hashed = hashlib.blake2b(digest_size=8)
    between = b""
    for part in normalised_parts(text):
        hashed.update(between + part.encode())
        between = b" "
    return int.from_bytes(hashed.digest(), "little")


def normalised(text: str) -> str:
    """Normalise a text: NFC, each run of white space as one blank, none at the ends."""
    return " ".join(normalised_parts(text))


def normalised_parts(text: str) -> Iterator[str]:
    """Yield the normalised text in parts to be joined by a blank; a list of all words takes ten times the
    memory."""
    text = unicodedata.normalize("NFC", text)
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _PART_CHARS)
        end = space.start() if space else len(text)
        if part := " ".join(text[start:end].split()):
            yield part
        start = end


def group_key(group: str | None, source: str | None) -> int:
    """64-bit key of a record's group: odd from its ``group``, else even from its ``source``, else 0."""
    if group is not None and (name := group.strip()):
        return text_key("group " + name) | 1
    if source is not None and (name := source.strip()):
        return (text_key("source " + name) & ~1) or 2
    return 0


def cut_text(text: str, rule: SplitRule, domain: str, trained_chars: int = 0) -> tuple[str, str, str]:
    """Cut the only text of a domain into head, middle and tail, which train, validate and test.

    The tail is ``rule.test_split`` of the text, the middle ``rule.val_split``. Each begins at the white space
    nearest to its place, as GPT-2's words do; white space farther away than a twentieth of the text or a
    thousand characters is not looked for. The head is at least the first ``trained_chars`` normalised
    characters. Head and middle are never empty; the tail is, without a ``test_split``, in a text of two
    characters, and in one that was cut by a rule that held out less. Raises DataError where that cannot be.

    With the test side at the end, a rule of smaller fractions validates on text that no larger one tests, and
    tests on text that no larger one validates.
    """
    if len(text) < 2:
        raise DataError(
            f"Domain '{domain}' holds one text of one character, which leaves nothing to validate on. "
            "Add text to it, or leave the domain out with --domains."
        )
    first = max(1, _raw_place(text, trained_chars))
    if first >= len(text):
        raise DataError(
            f"Domain '{domain}' holds one text, all of which the model was trained on, which leaves nothing "
            "to validate on. Add text to it, or leave the domain out with --domains."
        )
    n_chars = len(text)
    own = _near_space(text, round(n_chars * (1 - rule.val_split - rule.test_split)), 1, max(1, n_chars - 2))
    if not rule.test_split or first > own or n_chars < 3:
        place = _near_space(text, round(n_chars * (1 - rule.val_split)), first, n_chars - 1)
        return text[:place], text[place:], ""
    end = _near_space(text, round(n_chars * (1 - rule.test_split)), own + 1, n_chars - 1)
    return text[:own], text[own:end], text[end:]


def _near_space(text: str, aim: int, lowest: int, highest: int) -> int:
    """Find the white space nearest to ``aim`` within these bounds; ``aim`` itself if there is none."""
    aim = min(max(aim, lowest), highest)
    for distance in range(min(len(text) // 20, 1000) + 1):
        for place in (aim - distance, aim + distance):
            if lowest <= place <= highest and text[place].isspace():
                return place
    return aim


def _raw_place(text: str, n_chars: int) -> int:
    """Length of the shortest head of ``text`` that holds its first ``n_chars`` normalised characters."""
    if not n_chars:
        return 0
    return bisect.bisect_left(range(len(text)), n_chars, key=lambda place: len(normalised(text[:place])))


def hashed(keys: Keys, seed: int) -> Keys:
    """splitmix64(key ^ splitmix64(seed)): 64 random bits by key and seed."""
    return splitmix64(np.asarray(keys, np.uint64) ^ splitmix64(np.array([seed], np.uint64)))


SPLITMIX64_STEP = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(states: Keys) -> Keys:
    """Next output of SplitMix64 (Steele, Lea and Flood 2014) after each state; a bijection of 64 bits."""
    mixed: Keys = states + SPLITMIX64_STEP
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
