"""The selective scan compiled for the processor at hand: ``scan.cpp``, built where it is used.

Nothing has to be installed for it and nothing breaks without it: where there is a C++ compiler, the first
use builds the file for just this processor, in a second or two, and keeps the library in the user's
cache folder under a name that covers source, compiler, flags and processor. Where there is none,
``selective_scan`` takes the plain path. Why not numba or a wheel with a binary: docs/decisions/0013.

The library is C, called through ctypes: it gets plain float32 memory and sizes that were checked here,
whatever types, strides and autocast the caller has.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanothink.disk import is_safe, open_private, private_folder
from nanothink.models.selective_scan import plain

_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
_BUILD_SECONDS = 120
_CHECK_ERROR = 1e-5


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``selective_scan``. CPU only; computes in float32, and hands float64 to the plain path.

    Raises:
        RuntimeError: there is no library here; ``unavailable()`` says why.
    """
    if u.device.type != "cpu":
        raise ValueError(f"the compiled scan runs on a CPU, but u is on {u.device}")
    if u.dtype == torch.float64:
        return plain.scan(u, delta, A, B, C, D, state)
    h = u.new_zeros(u.shape[0], A.shape[1], u.shape[2], dtype=torch.float32) if state is None else state
    inputs = (z.float() for z in (u, delta, A, B, C, D, h))
    y, last = _CompiledScan.apply(*inputs)  # type: ignore[no-untyped-call]
    return y.to(u.dtype), last


def unavailable() -> str:
    """Reason that the compiled scan cannot be used here; empty where it can. The first call may build it."""
    return _load()[1]


class _CompiledScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        library = _library()
        u, delta, B, C, D, state = (z.contiguous() for z in (u, delta, B, C, D, state))
        At = A.t().contiguous()  # (N, D)
        sizes = (*u.shape, At.shape[0])
        y, last = torch.empty_like(u), torch.empty_like(state)
        starts = None
        if any(ctx.needs_input_grad):
            n_chunks = -(-u.shape[1] // library.nanothink_scan_chunk())
            starts = u.new_empty(u.shape[0], n_chunks, *At.shape)
            ctx.save_for_backward(u, delta, At, B, C, D, starts)
        library.nanothink_scan_forward(
            *sizes, *_pointers(u, delta, At, B, C, D, state, y, last, starts), torch.get_num_threads()
        )
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        library = _library()
        u, delta, At, B, C, D, starts = ctx.saved_tensors
        grad_y, grad_last = grad_y.contiguous(), grad_last.contiguous()
        batch, _, width = u.shape
        n_segments = -(-width // library.nanothink_scan_segment())
        grad_u, grad_delta, grad_state = (torch.empty_like(z) for z in (u, delta, grad_last))
        grad_A, grad_D = u.new_empty(batch, *At.shape), u.new_empty(batch, width)
        grad_B, grad_C = (u.new_empty(n_segments, *B.shape) for _ in range(2))
        library.nanothink_scan_backward(
            *u.shape,
            At.shape[0],
            *_pointers(u, delta, At, B, C, D, starts, grad_y, grad_last),
            *_pointers(grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_state),
            torch.get_num_threads(),
        )
        return grad_u, grad_delta, grad_A.sum(0).t(), grad_B.sum(0), grad_C.sum(0), grad_D.sum(0), grad_state


def _pointers(*tensors: Tensor | None) -> Iterator[int | None]:
    for tensor in tensors:
        assert tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
        yield None if tensor is None else tensor.data_ptr()


def _library() -> Any:
    library, why_not = _load()
    if library is None:
        raise RuntimeError(f"there is no compiled scan: {why_not}")
    return library


def find_compiler() -> str | None:
    """Path of the C++ compiler that would build the scan."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


@functools.cache
def _load() -> tuple[Any, str]:
    """The library, built if need be, or why there is none."""
    found = find_compiler()
    if found is None:
        return None, "no C++ compiler found (g++, c++ or clang++)"
    source = resources.files(__package__).joinpath("scan.cpp").read_bytes()
    try:
        version = subprocess.run([found, "--version"], capture_output=True, check=True, timeout=20).stdout
        parts = (source, version, " ".join(_FLAGS).encode(), processor().encode())
        name = f"scan-{hashlib.blake2b(b'|'.join(parts), digest_size=12).hexdigest()}.so"
        folder = private_folder("nanothink", "compiled")
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="nanothink-") as scratch:
                if not is_safe(Path(scratch).resolve()):
                    return None, f"other users can change what is in {tempfile.gettempdir()}"
                return _checked(_build(found, source, Path(scratch).resolve() / name))
        path = folder / name
        with contextlib.suppress(OSError):  # not there, another user's or damaged: built again below
            return _checked(_open(path))
        return _checked(_build(found, source, path))
    except subprocess.CalledProcessError as error:
        lines = bytes(error.stderr or b"").decode(errors="replace").strip().splitlines()
        return None, f"{found} could not build it: {lines[0] if lines else error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{found} could not build it: {error}"


def _build(compiler: str, source: bytes, path: Path) -> Any:
    """Compile under a temporary name and rename, so that no other process opens an unfinished library.

    The compiler's own temporary files lie beside it, where nobody else can reach them either.
    """
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as scratch:
        draft = Path(scratch) / path.name
        subprocess.run(
            [compiler, *_FLAGS, "-x", "c++", "-", "-o", str(draft)],
            input=source,
            capture_output=True,
            check=True,
            timeout=_BUILD_SECONDS,
            env={**os.environ, "TMPDIR": scratch},
        )
        draft.chmod(0o700)
        os.replace(draft, path)
    return _open(path)


def _open(path: Path) -> Any:
    """Load the library from the very file that was checked. Raises OSError if another user can change it."""
    descriptor = open_private(path)
    by_descriptor = Path(f"/proc/self/fd/{descriptor}")
    try:
        library = ctypes.CDLL(str(by_descriptor if by_descriptor.exists() else _copied(descriptor)))
    except OSError:
        os.close(descriptor)
        raise
    # Not closed: the loader would take another library under the same number for this one.
    sizes, pointer = [ctypes.c_int64] * 4, ctypes.c_void_p
    library.nanothink_scan_chunk.restype = library.nanothink_scan_segment.restype = ctypes.c_int64
    library.nanothink_scan_forward.argtypes = [*sizes, *[pointer] * 10, ctypes.c_int]
    library.nanothink_scan_backward.argtypes = [*sizes, *[pointer] * 16, ctypes.c_int]
    library.nanothink_scan_forward.restype = library.nanothink_scan_backward.restype = None
    return library


def _checked(library: Any) -> tuple[Any, str]:
    """Refuse a library whose results are wrong: a compiler can be wrong about a processor."""
    batch, length, width, n_states = 2, 21, 19, 3

    def waves(*shape: int) -> Tensor:  # no random numbers: the generators of a run must not move
        return torch.arange(1.0, 1 + torch.Size(shape).numel()).mul(0.7).sin().view(shape)

    u, delta = waves(batch, length, width), waves(batch, length, width).exp()
    At, B, C = -waves(n_states, width).exp(), waves(batch, length, n_states), waves(batch, length, n_states)
    D, state = waves(width), waves(batch, n_states, width)
    y, last = torch.empty_like(u), torch.empty_like(state)
    library.nanothink_scan_forward(
        *u.shape, n_states, *_pointers(u, delta, At, B, C, D, state, y, last, None), torch.get_num_threads()
    )
    expected, _ = plain.scan(u, delta, At.t(), B, C, D, state)
    error = float((y - expected).abs().max() / expected.abs().max())
    return (library, "") if error < _CHECK_ERROR else (None, f"its results are wrong here by {error:.1g}")


def _copied(descriptor: int) -> Path:
    """A copy of the open file in a folder of its own, for systems without /proc."""
    folder = Path(tempfile.mkdtemp(prefix="nanothink-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if not is_safe(folder.resolve()):
        raise PermissionError(errno.EPERM, "other users can change what is there", str(folder))
    with open(descriptor, "rb", closefd=False) as file:
        (folder / "scan.so").write_bytes(file.read())
    return folder / "scan.so"


def processor() -> str:
    """The processor as -march=native sees it: a home folder can be shared by different machines."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").partition("\n\n")[0]
        keep = ("vendor_id", "cpu family", "model", "flags", "CPU", "Features")
        return "\n".join(line for line in first.splitlines() if line.startswith(keep))
    return f"{platform.machine()} {platform.processor()}"
