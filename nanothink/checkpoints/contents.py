"""What the pickle of a checkpoint would build, found out without building it.

``torch.load(weights_only=True)`` runs no code, but it trusts a file in other ways: tuples nested a million
deep crash the process when they are hashed, small ones that share their parts take years to hash, and a
megabyte of pickle can unfold to a hundred of memory. So the instructions are followed here first, with
stand-ins for values, and everything is refused that a dict of tensors does not need: other names,
other instructions, keys that are no string or integer, storages that are not in the file at their full
size, tensors that reach beyond their storage.

What comes of it is a sketch of the contents, with ``TensorSketch`` for tensors and long strings cut off, all
that a listing needs. It is made without torch, whose import takes longer than all the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_PICKLE_BYTES = 64 * 2**20
"""A checkpoint's list of contents takes kilobytes, and a few megabytes for its tokenizer."""

_MAX_INSTRUCTIONS = 1_000_000
_MAX_TUPLES = 100
"""Tuples inside one another."""
_KEPT_CHARS = 200
"""So much of a string is kept: keys and names are short."""

_RUN_CODE = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_STORAGES = {
    "torch.storage UntypedStorage": 1,
    "torch BoolStorage": 1,
    "torch ByteStorage": 1,
    "torch CharStorage": 1,
    "torch ShortStorage": 2,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch IntStorage": 4,
    "torch FloatStorage": 4,
    "torch LongStorage": 8,
    "torch DoubleStorage": 8,
}
_DTYPES = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of a number, by what torch calls its type."""

_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_TENSOR_OF_TYPE = "torch._utils _rebuild_tensor_v3"
_PARAMETER = "torch._utils _rebuild_parameter"


class _Name(NamedTuple):
    """A class or function by its name in the pickle."""

    name: str


class _Tuple(tuple[Any, ...]):
    """A tuple that knows how deep the tuples in it are nested."""

    __match_args__ = ("items",)
    depth: int

    @property
    def items(self) -> tuple[Any, ...]:
        return tuple(self)


class _Storage(NamedTuple):
    key: str
    numbers: int
    bytes: int


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict."""


@dataclass(frozen=True)
class TensorSketch:
    """Where a tensor is in the file, and its shape; not its numbers."""

    storage: str
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def numel(self) -> int:
        return math.prod(self.shape)


_MARK = object()


def check_pickle(data: bytes, sizes: Mapping[str, int], refuse: Callable[[str], Exception]) -> Any:
    """Refuse a pickle that would do anything but build dicts, lists and tuples of values and tensors.

    Args:
        sizes: bytes of each storage in the file, by its key.
        refuse: makes the exception from a reason.

    Returns:
        What it would build, with ``TensorSketch`` for each tensor, and strings cut after 200 characters.
    """
    try:
        return _Reader(sizes).run(data)
    except _Unfit as unfit:
        raise refuse(_would_run_code(data) or str(unfit)) from None
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise refuse(f"its list of contents is damaged ({error})") from None


def _instructions(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    return pickletools.genops(data)


class _Unfit(Exception):
    """Why the pickle is refused."""


def _would_run_code(data: bytes) -> str | None:
    """How, so that what would run code is called so, whatever else was wrong with it first."""
    with contextlib.suppress(ValueError):
        for opcode, argument, _ in itertools.islice(_instructions(data), _MAX_INSTRUCTIONS):
            if opcode.name == "GLOBAL" and not _is_safe(argument):
                name = argument.replace(" ", ".")
                return f"loading it would run code: it calls {name!r}, which no checkpoint needs"
            if opcode.name in _RUN_CODE:
                return f"loading it would run code: it uses the pickle instruction {opcode.name}"
    return None


def _is_safe(name: str) -> bool:
    return name in {*_STORAGES, _DICT, _TENSOR, _TENSOR_OF_TYPE, _PARAMETER} or _itemsize(name) is not None


def _itemsize(name: str) -> int | None:
    module, _, attribute = name.partition(" ")
    return _DTYPES.get(attribute) if module == "torch" else None


class _Reader:
    """The machine that a pickle drives, on stand-ins for values."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        stack = self._stack
        for count, (opcode, argument, _) in enumerate(_instructions(data)):
            name = opcode.name
            if count == _MAX_INSTRUCTIONS:
                raise _Unfit(f"its list of contents takes more than {count:,} instructions")
            if name in ("BINUNICODE", "SHORT_BINSTRING"):
                stack.append(argument[:_KEPT_CHARS])
            elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
                stack.append(argument)
            elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(self._memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT"):
                self._memo[argument] = stack[-1]
            elif name == "MARK":
                stack.append(_MARK)
            elif name in ("EMPTY_LIST", "EMPTY_DICT"):
                stack.append([] if name == "EMPTY_LIST" else {})
            elif name == "EMPTY_TUPLE":
                self._make_tuple([])
            elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                self._make_tuple(self._above_mark() if name == "TUPLE" else self._pop(int(name[-1])))
            elif name in ("APPEND", "APPENDS"):
                items = self._above_mark() if name == "APPENDS" else self._pop(1)
                self._expect(stack[-1], list)
                stack[-1].extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                self._set_items(self._above_mark() if name == "SETITEMS" else self._pop(2))
            elif name == "GLOBAL" and _is_safe(argument):
                stack.append(_Name(argument))
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "REDUCE":
                function, arguments = self._pop(2)
                stack.append(self._call(function, arguments))
            elif name == "BUILD":  # an OrderedDict's own attributes, as in a module's state dict
                self._pop(1)
                self._expect(stack[-1], _Ordered)
            elif name not in ("PROTO", "STOP"):
                raise _Unfit(f"its list of contents uses the pickle instruction {name}, unlike torch.save")
        return stack[-1]

    def _pop(self, n: int) -> list[Any]:
        if len(self._stack) < n:
            raise IndexError("an instruction lacks its values")
        taken = self._stack[-n:]
        del self._stack[-n:]
        return taken

    def _above_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                taken = self._stack[at + 1 :]
                del self._stack[at:]
                return taken
        raise IndexError("an instruction lacks its mark")

    def _expect(self, value: Any, kind: type) -> None:
        if not isinstance(value, kind):
            raise _Unfit(f"its list of contents is damaged (a {kind.__name__} is due)")

    def _make_tuple(self, items: list[Any]) -> None:
        depth = 1 + max((item.depth for item in items if isinstance(item, _Tuple)), default=0)
        if depth > _MAX_TUPLES:
            raise _Unfit(f"its values are nested without end (more than {_MAX_TUPLES} tuples)")
        made = _Tuple(items)
        made.depth = depth
        self._stack.append(made)

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise IndexError("a key lacks its value")
        self._expect(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise _Unfit("one of its keys is neither a string nor an integer")
            self._stack[-1][key] = value

    def _storage(self, identity: Any) -> _Storage:
        match identity:
            case _Tuple(("storage", _Name(kind), str(key), str(), int(numbers))) if kind in _STORAGES:
                size = _STORAGES[kind] * numbers
                if self._sizes.get(key) != size:
                    raise _Unfit(f"its storage {key!r} claims {size:,} bytes, but has not the data for it")
                return _Storage(key, numbers, size)
        raise _Unfit("its list of contents is damaged (no storage of tensors)")

    def _call(self, function: _Name, arguments: _Tuple) -> _Ordered | TensorSketch:
        if not isinstance(function, _Name) or not isinstance(arguments, _Tuple):
            raise _Unfit("its list of contents is damaged (a call lacks its name)")
        match function.name, arguments.items:
            case name, () if name == _DICT:
                return _Ordered()
            case name, (TensorSketch() as tensor, bool(), _Ordered()) if name == _PARAMETER:
                return tensor
            case name, (_Storage() as storage, int(first), _Tuple(shape), _Tuple(stride), bool(), _, *rest):
                if name == _TENSOR:
                    return self._tensor(storage, storage.numbers, first, shape, stride)
                if name == _TENSOR_OF_TYPE and rest and isinstance(rest[0], _Name):
                    itemsize = _itemsize(rest[0].name) or math.inf
                    return self._tensor(storage, int(storage.bytes // itemsize), first, shape, stride)
        raise _Unfit("it holds something that is built in another way than torch.save builds tensors")

    def _tensor(
        self, storage: _Storage, numbers: int, first: int, shape: tuple[Any, ...], stride: tuple[Any, ...]
    ) -> TensorSketch:
        if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in (first, *shape, *stride)):
            raise _Unfit("it holds a tensor whose shape makes no sense")
        count = math.prod(shape)
        reach = first + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if count else 0
        if count > numbers or reach > numbers:
            raise _Unfit(f"it holds a tensor of shape {shape} but not the data for it")
        return TensorSketch(storage.key, first, shape, stride)
