"""BPE learnt in a process of its own: equal to the reference, told about, and never left behind."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import psutil
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import Told

from nanothink.data import bpe_process
from nanothink.data.bpe import MAX_WORD_BYTES, learn, make_byte_level
from nanothink.data.bpe_process import learn_in_process
from nanothink.errors import TokenizerError

EOS = "<|endoftext|>"
SHORT = "a few words, a few more words and a few words again"


def many_words(n_texts: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    letters = "etaoinshrdlu"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    return [" ".join(rng.choices(words, k=400)) for _ in range(n_texts)]


_OF_OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def _those_of_other_tests() -> None:
    """Processes that other files' tests keep running in this one."""
    _OF_OTHERS.clear()
    _OF_OTHERS.update(process.pid for process in psutil.Process().children())


def children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if process.pid not in _OF_OTHERS]


def canonical(tokenizer: tokenizers.Tokenizer) -> bytes:
    return orjson.dumps(orjson.loads(tokenizer.to_str()), option=orjson.OPT_SORT_KEYS)


def same_as_reference(texts: list[str], vocab_size: int) -> bool:
    learnt = tokenizers.Tokenizer.from_str(learn_in_process(texts, vocab_size, EOS))
    return canonical(learnt) == canonical(learn(texts, vocab_size, EOS))


@pytest.mark.parametrize(
    ("texts", "vocab_size"),
    [
        ([], 300),
        ([""], 257),
        (["ab", "", "漢字 😀\0\r\n", EOS], 300),
        ([SHORT * 10_000], 290),  # more than a pipe holds
        (many_words(60), 3000),
    ],
)
def test_equals_the_reference(texts: list[str], vocab_size: int) -> None:
    assert same_as_reference(texts, vocab_size)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=50), max_size=8))
def test_equals_the_reference_on_odd_texts(texts: list[str]) -> None:
    assert same_as_reference([*texts, *texts], 280)


RUNS = {
    "dots": "." * 150_000,
    "letters": "".join(random.Random(0).choices("ACGT", k=100_000)),
    "characters of three bytes": "\u754c" * 100_000,
    "blanks": " " * 150_000,
    "one word in a text": "a few words " + "=" * 150_000 + " and more words",
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_long_run_without_a_break_takes_seconds(run: str) -> None:
    start = time.process_time()
    learnt = learn([run, SHORT], 300, EOS)
    assert time.process_time() - start < 4  # without a cap 12
    assert learnt.decode(learnt.encode(run).ids) == run
    assert learnt.pre_tokenizer.__getstate__() == tokenizers.pre_tokenizers.ByteLevel(False).__getstate__()


def test_words_of_usual_length_are_learnt_as_if_there_were_no_cap() -> None:
    texts = [*many_words(20), "x" * MAX_WORD_BYTES, "\u754c" * (MAX_WORD_BYTES // 3), "Donaudampf" * 12]
    uncapped = tokenizers.Tokenizer(tokenizers.models.BPE())
    make_byte_level(uncapped)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    uncapped.train_from_iterator(texts, trainer)
    assert canonical(learn(texts, 600, EOS)) == canonical(uncapped)


def test_the_reference_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    learn([SHORT], 270, EOS)
    assert capfd.readouterr() == ("", "")


def test_merging_is_told_from_none_to_all(capfd: pytest.CaptureFixture[str]) -> None:
    at: list[tuple[str, int, int]] = []
    drawn: list[int] = []

    def texts() -> Iterator[str]:
        for text in many_words(30):
            drawn.append(len(at))
            yield text

    learn_in_process(texts(), 2000, EOS, Told(progress=lambda *told: at.append(told)))
    assert set(drawn) == {0}  # merging begins after the last text
    stages, done, totals = zip(*at, strict=True)
    assert set(stages) == {"tokenizer: merging"}
    shares = [d / t for d, t in zip(done, totals, strict=True)]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    assert 50 < len(at) < 600
    assert max(later - earlier for earlier, later in itertools.pairwise(shares)) < 0.2
    assert capfd.readouterr() == ("", "")


def test_nothing_to_merge_is_told_as_done() -> None:
    at: list[tuple[str, int, int]] = []
    learn_in_process(["ab"], 5000, EOS, Told(progress=lambda *told: at.append(told)))
    assert at[-1] == ("tokenizer: merging", 5000, 5000)


def test_what_the_texts_raise_leaves_no_process() -> None:
    def texts() -> Iterator[str]:
        yield SHORT
        assert len(children()) == 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        learn_in_process(texts(), 300, EOS)
    assert children() == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_merges_leaves_no_process(sent: signal.Signals) -> None:
    class Stopped(BaseException):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stopped

    before = signal.signal(sent, stop)
    try:
        with pytest.raises(Stopped):
            learn_in_process(many_words(20), 3000, EOS, Told(progress=lambda *_: os.kill(os.getpid(), sent)))
    finally:
        signal.signal(sent, before)
    assert children() == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_are_left_to_the_one_who_started_it(sent: signal.Signals) -> None:
    def texts() -> Iterator[str]:
        yield from many_words(10)
        time.sleep(1.0)  # it is there by now
        for child in children():
            child.send_signal(sent)
        yield from many_words(10)

    assert EOS in learn_in_process(texts(), 300, EOS)


def test_a_process_that_is_killed_is_one_clear_error() -> None:
    def texts() -> Iterator[str]:
        for text in many_words(200):
            for child in children():
                child.kill()
            yield text

    with pytest.raises(TokenizerError, match=r"ended by SIGKILL, as happens when memory runs out.*--domains"):
        learn_in_process(texts(), 300, EOS)
    assert children() == []


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("raise MemoryError('no room')", "failed: MemoryError: no room"),
        ("import os; os._exit(7)", "left with exit code 7"),
        ("", "left with exit code 0"),
    ],
)
def test_a_process_that_fails_is_one_clear_error(
    start: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe_process, "_START", start)
    with pytest.raises(TokenizerError) as caught:
        learn_in_process(many_words(200), 300, EOS)
    assert said in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_no_process_to_be_had_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    with pytest.raises(TokenizerError, match="No process could be started"):
        learn_in_process([SHORT], 300, EOS)


def test_half_a_surrogate_pair_is_a_clear_error() -> None:
    with pytest.raises(TokenizerError, match="Character 3 "):
        learn_in_process([SHORT, "ab\ud800"], 300, EOS)
    assert children() == []


def test_it_ends_with_the_one_who_started_it() -> None:
    script = (
        "import itertools; from nanothink.data.bpe_process import learn_in_process\n"
        "learn_in_process(itertools.repeat('some words'), 300, '<|endoftext|>')"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        deadline = time.monotonic() + 30
        while not (own := psutil.Process(parent.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        parent.kill()
    assert psutil.wait_procs(own, timeout=20)[1] == []


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("tokenizers", "struct", "signal"):
        (here / f"{name}.py").write_text("raise SystemExit('taken from the current folder')")
    script = tmp_path / "script.py"
    script.write_text(
        "from nanothink.data.bpe_process import learn_in_process\n"
        "print(len(learn_in_process(['some words'], 300, '<|endoftext|>')))"
    )
    package = Path(bpe_process.__file__).parents[2]
    noisy = {"PYTHONVERBOSE": "1", "PYTHONDEVMODE": "1", "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, script], cwd=here, env={**os.environ, **noisy}, capture_output=True, check=True
    )
    assert int(done.stdout) > 1000


def test_the_process_imports_the_library_alone() -> None:
    script = (
        "import sys; import nanothink.data.bpe\n"
        "print(*(n for n in ('numpy', 'torch', 'orjson', 'rich', 'pydantic') if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
