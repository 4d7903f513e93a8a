"""C++ compiled for the processor at hand, where it is used: the selective scan, decoding, passes of training.

Nothing has to be installed for it and nothing breaks without it: where there is a C++ compiler, the first
use builds a source for just this processor, in a second or two, and keeps the library in the user's
cache folder under a name that covers source, compiler, flags and processor. Where there is none, the caller
takes its plain path. Why not numba or a wheel with a binary: docs/decisions/0013.

Libraries are C, called through ctypes: they get plain float32 memory and sizes that the caller has checked.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanothink.disk import is_safe, open_private, private_folder

_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
_BUILD_SECONDS = 120
_LARGEST_ERROR = 1e-5


@dataclass(frozen=True)
class Source:
    """C++ beside the module that uses it; vectors.h and threads.h come before it.

    Args:
        package: the package that holds the files.
        files: their names, in the order in which they are compiled; the last one's stem begins the library's.
        declare: tell ctypes the types of a library's functions.
        error: of the library's results, relative, against plain ones: a compiler can be wrong about a
            processor. It must leave random generators alone: those of a run must not move.
    """

    package: str
    files: tuple[str, ...]
    declare: Callable[[Any], None]
    error: Callable[[Any], float]

    def read(self) -> bytes:
        """The text that is compiled."""
        own = (resources.files(self.package) / file for file in self.files)
        parts = (*(resources.files(__package__) / file for file in ("vectors.h", "threads.h")), *own)
        return b"".join(part.read_bytes() for part in parts)


def load(source: Source) -> tuple[Any, str]:
    """The library, built if need be, or None and the reason. The caller keeps the answer."""
    found = find_compiler()
    if found is None:
        return None, "no C++ compiler found (g++, c++ or clang++)"
    text = source.read()
    try:
        version = subprocess.run([found, "--version"], capture_output=True, check=True, timeout=20).stdout
        parts = (text, version, " ".join(_FLAGS).encode(), processor().encode())
        digest = hashlib.blake2b(b"|".join(parts), digest_size=12).hexdigest()
        name = f"{Path(source.files[-1]).stem}-{digest}.so"
        folder = private_folder("nanothink", "compiled")
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="nanothink-") as scratch:
                if not is_safe(Path(scratch).resolve()):
                    return None, f"other users can change what is in {tempfile.gettempdir()}"
                return _checked(source, build(found, text, Path(scratch).resolve() / name))
        path = folder / name
        with contextlib.suppress(OSError):  # not there, another user's or damaged: built again below
            return _checked(source, open_library(path))
        return _checked(source, build(found, text, path))
    except subprocess.CalledProcessError as error:
        lines = bytes(error.stderr or b"").decode(errors="replace").strip().splitlines()
        return None, f"{found} could not build it: {lines[0] if lines else error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{found} could not build it: {error}"


def find_compiler() -> str | None:
    """Path of the C++ compiler that would build the libraries."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def build(compiler: str, text: bytes, path: Path) -> Any:
    """Compile under a temporary name and rename, so that no other process opens an unfinished library.

    The compiler's own temporary files lie beside it, where nobody else can reach them either.
    """
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as scratch:
        draft = Path(scratch) / path.name
        subprocess.run(
            [compiler, *_FLAGS, "-x", "c++", "-", "-o", str(draft)],
            input=text,
            capture_output=True,
            check=True,
            timeout=_BUILD_SECONDS,
            env={**os.environ, "TMPDIR": scratch},
        )
        draft.chmod(0o700)
        os.replace(draft, path)
    return open_library(path)


def open_library(path: Path) -> Any:
    """Load the library from the very file that was checked. Raises OSError if another user can change it."""
    descriptor = open_private(path)
    by_descriptor = Path(f"/proc/self/fd/{descriptor}")
    try:
        # Not closed: the loader would take another library under the same number for this one.
        return ctypes.CDLL(str(by_descriptor if by_descriptor.exists() else _copied(descriptor)))
    except OSError:
        os.close(descriptor)
        raise


def _checked(source: Source, library: Any) -> tuple[Any, str]:
    source.declare(library)
    ctypes.c_void_p.in_dll(library, "nanothink_team").value = _team()
    error = source.error(library)
    return (library, "") if error < _LARGEST_ERROR else (None, f"its results are wrong here by {error:.1g}")


def _team() -> int | None:
    """Address of the function that runs another one on PyTorch's own threads; None without OpenMP."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # found in the libraries that it loads, too
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def _copied(descriptor: int) -> Path:
    """A copy of the open file in a folder of its own, for systems without /proc."""
    folder = Path(tempfile.mkdtemp(prefix="nanothink-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if not is_safe(folder.resolve()):
        raise PermissionError(errno.EPERM, "other users can change what is there", str(folder))
    with open(descriptor, "rb", closefd=False) as file:
        (folder / "library.so").write_bytes(file.read())
    return folder / "library.so"


def pointers(*tensors: Tensor | None) -> Iterator[int | None]:
    """Addresses of contiguous float32 tensors."""
    for tensor in tensors:
        assert tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
        yield None if tensor is None else tensor.data_ptr()


def waves(*shape: int) -> Tensor:
    """Numbers to check a library with, without any from a random generator."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).mul(0.7).sin().view(shape)


def processor() -> str:
    """The processor as -march=native sees it: a home folder can be shared by different machines."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").partition("\n\n")[0]
        keep = ("vendor_id", "cpu family", "model", "flags", "CPU", "Features")
        return "\n".join(line for line in first.splitlines() if line.startswith(keep))
    return f"{platform.machine()} {platform.processor()}"
