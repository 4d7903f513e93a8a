"""The libraries of decoding operations and of passes: right for every kind of vector, refused where wrong."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import pytest

from nanothink.models import native, passes
from nanothink.models.decoding import compiled

pytestmark = pytest.mark.skipif(bool(compiled.unavailable()), reason=compiled.unavailable() or "-")
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86 processors")


def error_of(
    monkeypatch: pytest.MonkeyPatch,
    text: bytes,
    march: str = "native",
    source: native.Source = compiled.SOURCE,
) -> float:
    """Build the source for a processor; its largest relative error."""
    compiler = native.find_compiler()
    assert compiler is not None
    flags = [f"-march={march}" if flag.startswith("-march=") else flag for flag in native._FLAGS]
    monkeypatch.setattr(native, "_FLAGS", ("-O1", *(flag for flag in flags if flag != "-O3")))
    with tempfile.TemporaryDirectory() as folder:
        library = native.build(compiler, text, Path(folder).resolve() / "library.so")
    source.declare(library)
    return source.error(library)


@x86
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])  # vectors of 4 and of 8 numbers, any processor's
@pytest.mark.parametrize("source", [compiled.SOURCE, passes.SOURCE], ids=lambda source: source.files[-1])
def test_narrower_vectors_give_the_same_results(
    source: native.Source, march: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if march == "x86-64-v3" and " avx2 " not in Path("/proc/cpuinfo").read_text("utf-8"):
        pytest.skip("this processor has no AVX2")
    assert error_of(monkeypatch, source.read(), march, source) < 1e-5


def test_the_check_finds_a_wrong_library(monkeypatch: pytest.MonkeyPatch) -> None:
    text = compiled.SOURCE.read()
    assert text.count(b"weights[i] * v") == 1
    assert error_of(monkeypatch, text.replace(b"weights[i] * v", b"weights[i] * v * splat(1.001f)")) > 1e-4
