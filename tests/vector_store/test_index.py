"""The index: exact where it says so, near enough elsewhere, and at peace with torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from reports import Told

from nanothink.config import VectorStoreConfig
from nanothink.errors import UsageError, VectorStoreDamagedError, VectorStoreError
from nanothink.vector_store.index import (
    Float32,
    Int64,
    Kind,
    NeighbourIndex,
    bytes_per_key,
    choose_kind,
    choose_lists,
    import_faiss,
    sample_size,
)

WIDTH = 32


def clustered(n: int, seed: int = 0) -> Float32:
    """Keys of length 1 in clumps, as states are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).standard_normal((200, WIDTH))
    keys = centres[rng.integers(200, size=n)] + 0.5 * rng.standard_normal((n, WIDTH))
    return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)


def made(kind: Kind, keys: Float32, numbers: Int64, n_probe: int = 16) -> NeighbourIndex:
    index = NeighbourIndex.create(kind, WIDTH, len(keys), n_probe)
    index.train(keys[: sample_size(kind, len(keys))])
    for first in range(0, len(keys), 1000):
        index.add(keys[first : first + 1000], numbers[first : first + 1000])
    return index


def exact(keys: Float32, numbers: Int64, queries: Float32, k: int) -> tuple[Float32, Int64]:
    similarities = queries @ keys.T
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, order, 1), numbers[order]


def test_the_exact_index_is_exact() -> None:
    keys, numbers = clustered(3000), np.arange(3000, dtype=np.int64) * 7 + 5
    found = made("exact", keys, numbers).search(clustered(50, seed=2), 20)
    expected = exact(keys, numbers, clustered(50, seed=2), 20)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize(("kind", "least"), [("sq8", 0.9), ("pq", 0.4)])
def test_the_others_find_most_of_the_nearest(kind: Kind, least: float) -> None:
    keys, numbers, queries = clustered(10_000), np.arange(10_000, dtype=np.int64), clustered(200, seed=2)
    index = made(kind, keys, numbers)
    similarities, found = index.search(queries, 32)
    _, expected = exact(keys, numbers, queries, 32)
    recall = np.mean([len(set(a) & set(b)) / 32 for a, b in zip(found, expected, strict=True)])
    assert recall >= least
    assert (np.diff(similarities, axis=1) <= 1e-6).all()
    assert index.n_keys == 10_000
    assert index.n_lists == choose_lists(10_000)


def test_a_second_time_it_is_the_same() -> None:
    keys, numbers, queries = clustered(12_000), np.arange(12_000, dtype=np.int64), clustered(20, seed=2)
    one, other = (made("sq8", keys, numbers).search(queries, 10) for _ in range(2))
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(one[0], other[0])


@pytest.mark.parametrize("kind", ["exact", "sq8"])
def test_what_was_written_is_read(kind: Kind, tmp_path: Path) -> None:
    keys, numbers, queries = clustered(12_000), np.arange(12_000, dtype=np.int64) * 3, clustered(20, seed=2)
    index = made(kind, keys, numbers)
    index.write(tmp_path / "i")
    for writable in (False, True):
        again = NeighbourIndex.read(tmp_path / "i", kind, 16, writable=writable)
        assert (again.n_keys, again.width, again.n_lists) == (12_000, WIDTH, index.n_lists)
        for one, other in zip(again.search(queries, 10), index.search(queries, 10), strict=True):
            np.testing.assert_array_equal(one, other)
    found = {int(n): key for group in again.groups() for n, key in zip(*group, strict=True)}
    assert sorted(found) == numbers.tolist()
    largest = max(float(np.abs(found[int(n)] - key).max()) for n, key in zip(numbers, keys, strict=True))
    assert largest < (1e-6 if kind == "exact" else 0.02)
    again.remove(numbers[:5])
    assert again.n_keys == 11_995
    assert not set(again.search(keys[:5], 3)[1].ravel()) & set(numbers[:5].tolist())


def test_where_there_are_too_few_the_rest_is_missing() -> None:
    index = made("exact", clustered(3), np.arange(3, dtype=np.int64))
    similarities, found = index.search(clustered(2, seed=2), 5)
    assert (found[:, 3:] == -1).all()
    assert (similarities[:, 3:] == -np.inf).all()
    assert sorted(found[0, :3]) == [0, 1, 2]


def test_the_size_decides() -> None:
    settings = VectorStoreConfig(exact_below=100, pq_above=1000)
    assert [choose_kind(settings, n) for n in (100, 101, 1000, 1001)] == ["exact", "sq8", "sq8", "pq"]
    assert choose_kind(VectorStoreConfig(index="pq"), 5) == "pq"
    assert [choose_lists(n) for n in (1, 100, 60_000, 1_000_000, 10**9)] == [1, 2, 512, 2048, 16384]
    for n in (100, 60_000, 1_000_000):
        assert sample_size("sq8", n) >= 39 * choose_lists(n)  # or FAISS warns
    assert sample_size("exact", 10**6) == 0
    assert bytes_per_key("exact", 128) > bytes_per_key("sq8", 128) > bytes_per_key("pq", 128) == 40
    with pytest.raises(UsageError, match="use sq8"):
        NeighbourIndex.create("pq", 30, 1000, 4)


def test_without_faiss_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match="pip install faiss-cpu"):
        import_faiss()


@pytest.mark.parametrize("first", ["import faiss, torch", "import nanothink.vector_store.index"])
def test_faiss_and_torch_work_in_one_process_and_its_threads(first: str) -> None:
    """Two OpenMP runtimes: whoever comes first, products, k-means and searches end, and are right."""
    code = f"""
        {first}
        import threading
        import numpy as np, torch
        from nanothink.vector_store.index import NeighbourIndex, import_faiss
        torch.set_num_threads(2)
        faiss = import_faiss()
        assert faiss.omp_get_max_threads() == 2
        x = torch.randn(6000, 32, generator=torch.Generator().manual_seed(0))
        x = torch.nn.functional.normalize(x, dim=1)

        def both():
            index = NeighbourIndex.create("sq8", 32, 6000, 8)
            for _ in range(3):
                (x @ x[:2000].T).relu().sum()
            index.train(x.numpy())
            index.add(x.numpy(), np.arange(6000))
            assert (index.search(x[:500].numpy(), 1)[1][:, 0] == np.arange(500)).mean() > 0.95
            layer = torch.nn.Linear(32, 512)
            layer(x).square().mean().backward()

        both()
        thread = threading.Thread(target=both)
        thread.start()
        thread.join(100)
        assert not thread.is_alive()
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("kind", ["sq8", "pq"])
def test_training_in_steps_equals_one_call(kind: Kind) -> None:
    keys = clustered(4_000)[: sample_size(kind, 4_000)]
    steps, reference = (NeighbourIndex.create(kind, WIDTH, 4_000, 16) for _ in range(2))
    at: dict[str, list[tuple[int, int]]] = {}
    steps.train(keys, Told(progress=lambda stage, *told: at.setdefault(stage, []).append(told)))
    reference._index.cp.max_points_per_centroid = 1 << 30
    reference._index.train(keys)
    parts = {"vector store: learning lists": 11, "vector store: learning codes": WIDTH // 4}
    if kind == "sq8":
        del parts["vector store: learning codes"]
    assert at == {stage: [(step, n) for step in range(n + 1)] for stage, n in parts.items()}
    for index in (steps, reference):
        index.add(keys, np.arange(len(keys)))
    lists = [index._index.quantizer.reconstruct_n(0, index.n_lists) for index in (steps, reference)]
    assert np.array_equal(*lists)
    found = [index.search(keys[:50], 8) for index in (steps, reference)]
    assert all(np.array_equal(*of) for of in zip(*found, strict=True))


def test_an_exact_index_has_nothing_to_train() -> None:
    at: list[tuple[int, int]] = []
    NeighbourIndex.create("exact", WIDTH, 10, 16).train(
        clustered(10), Told(progress=lambda _, *told: at.append(told))
    )
    assert at == []


@pytest.mark.parametrize(("kind", "n_keys"), [("sq8", 1), ("sq8", 5), ("sq8", 100), ("pq", 256)])
def test_few_keys_are_enough_for_lists(kind: Kind, n_keys: int) -> None:
    keys, numbers = clustered(n_keys), np.arange(n_keys, dtype=np.int64)
    assert made(kind, keys, numbers).search(keys[:1], 1)[1][0, 0] in numbers


def test_too_few_keys_for_the_codes_are_said_with_what_to_use() -> None:
    with pytest.raises(UsageError, match=r"index=pq learns 256 codes .* there are 255 keys\. Use sq8"):
        NeighbourIndex.create("pq", WIDTH, 255, 16)


def test_what_faiss_raises_says_what_was_being_done() -> None:
    index = NeighbourIndex.create("sq8", WIDTH, 10_000, 16)
    with pytest.raises(VectorStoreError, match=r"FAISS failed at learning 256 lists from 3 keys .*256"):
        index.train(clustered(3))
    index = made("exact", clustered(100), np.arange(100, dtype=np.int64))
    with pytest.raises(VectorStoreError, match="a search among 100 keys of width 32"):
        index.search(np.zeros((1, WIDTH + 1), np.float32), 3)
    with pytest.raises(VectorStoreError, match="adding to 100 keys"):
        index.add(np.zeros((1, WIDTH - 1), np.float32), np.zeros(1, np.int64))


def test_a_machine_without_memory_is_told_how_to_use_less(monkeypatch: pytest.MonkeyPatch) -> None:
    index = made("exact", clustered(100), np.arange(100, dtype=np.int64))
    for exhausted in (MemoryError("std::bad_alloc"), RuntimeError("std::bad_alloc")):

        def refuse(*_: object, error: Exception = exhausted) -> None:
            raise error

        monkeypatch.setattr(index._index, "add_with_ids", refuse)
        with pytest.raises(VectorStoreError, match=r"not enough memory for adding .*max_keys.*index=pq"):
            index.add(clustered(1), np.zeros(1, np.int64))


@pytest.mark.parametrize("content", ["empty", "no index", "cut", "of another kind", "of another metric"])
@pytest.mark.parametrize("kind", ["exact", "sq8"])
def test_a_file_that_is_no_such_index_is_named(kind: Kind, content: str, tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    index = made(kind, clustered(1000), np.arange(1000, dtype=np.int64))
    if content == "of another kind":
        index = made("sq8" if kind == "exact" else "exact", clustered(1000), np.arange(1000))
    elif content == "of another metric":
        index._index.metric_type = import_faiss().METRIC_L2
    index.write(path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "no index": b"text " * 100, "cut": whole[:-50]}.get(content, whole))
    with pytest.raises(VectorStoreDamagedError, match=r"index\.faiss is damaged: .*store build --overwrite"):
        NeighbourIndex.read(path, kind, 16, writable=True)
