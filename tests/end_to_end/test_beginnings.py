"""Models whose texts begin with BOS (Llama, Mistral): ours see what ``transformers`` gives them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from serve.conftest import running
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

import nanothink as package
from nanothink.cli.app import run
from nanothink.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from nanothink.runs.exporting import export_checkpoint
from nanothink.runs.exporting_gguf import export_gguf

TEXTS = ["time light stone", "A river, and <s> as text.", "Naïve café\n", ""]


@pytest.fixture(scope="module", params=["Llama 2", "Llama 3"])
def published(
    request: pytest.FixtureRequest, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Any]:
    """The folder of a random model as ``transformers`` writes it, its import, and the model itself."""
    import transformers

    plain = load_tokenizer(str(tiny_tokenizer))
    folder = save_tokenizer(plain, tmp_path_factory.mktemp("published") / "model")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    assert bos is not None
    before = TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    in_turn = Sequence([ByteLevel(trim_offsets=False), before])
    backend.post_processor = before if request.param == "Llama 2" else in_turn
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<s>"}))
    config = transformers.LlamaConfig(
        vocab_size=bos + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        bos_token_id=bos,
        eos_token_id=plain.eos_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    where = ["--name", "p", "--checkpoint-dir", str(folder.parent)]
    assert run(["checkpoints", "import", str(folder), *where]) == 0
    return folder, folder.parent / "p_expert.pt", model


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def test_a_prompt_has_their_tokens_also_after_an_export(
    published: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    folder, checkpoint, _ = published
    tokenizer = package.load(checkpoint).tokenizer
    export_checkpoint(checkpoint, tmp_path / "out")
    for place in (folder, tmp_path / "out"):
        for text in TEXTS:
            assert theirs(place)(text)["input_ids"] == tokenizer.encode_prompt(text)
        assert (
            theirs(place).bos_token_id == AutoConfig.from_pretrained(place).bos_token_id == tokenizer.bos_id
        )
        assert load_tokenizer(str(place)).fingerprint == tokenizer.fingerprint
    again = Tokenizer.from_state(tokenizer.to_state())
    assert (again.fingerprint, again.bos_id) == (tokenizer.fingerprint, tokenizer.bos_id)


def test_it_writes_what_transformers_writes(published: tuple[Path, Path, Any]) -> None:
    folder, checkpoint, model = published
    ours, tokenizer = package.load(checkpoint), theirs(folder)
    for prompt in TEXTS:
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            written = model.generate(asked, max_new_tokens=12, do_sample=False)[0, asked.shape[1] :]
        expected = tokenizer.decode([token for token in written if token != tokenizer.eos_token_id])
        assert ours.generate(prompt, temperature=0.0, max_new_tokens=12) == expected


def test_documents_are_scored_behind_their_bos(
    published: tuple[Path, Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint, model = published
    texts = [text for text in TEXTS if text]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    where = ["--data-dir", str(tmp_path), "--split", "all", "--json"]
    capsys.readouterr()
    assert run(["eval", str(checkpoint), *where]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    tokenizer = theirs(folder)
    eos = tokenizer.eos_token_id
    documents = [[*tokenizer(text)["input_ids"], eos] for text in texts]
    stream = [token for document in documents for token in document]
    nats, n_scored = 0.0, 0
    for first in range(0, len(stream), 48):
        inputs = [eos, *stream][first : first + 48]
        with torch.inference_mode():
            scores = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
        for place, token in enumerate(stream[first : first + 48]):
            if token != tokenizer.bos_token_id:
                nats -= float(scores[place, token])
                n_scored += 1
    assert row["overall"]["tokens"] == n_scored == len(stream) - len(texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert row["overall"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)


def test_it_is_trained_further_so(
    published: tuple[Path, Path, Any], tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, checkpoint, _ = published
    capsys.readouterr()
    where = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path), "--max-steps", "2"]
    assert run(["pretrain", "transformer", "--init", str(checkpoint), *where]) == 0
    shown = capsys.readouterr()
    assert "sample: '" in shown.out + shown.err
    assert "sample: '<s>" not in shown.out + shown.err
    assert "conversations" not in shown.out + shown.err
    ours = package.load(tmp_path / "transformer_expert.pt").tokenizer
    assert ours.bos_token == "<s>"
    found = package.load(checkpoint).tokenizer
    assert found.fingerprint == ours.fingerprint


def test_the_server_begins_a_text_with_it(published: tuple[Path, Path, Any]) -> None:
    _, checkpoint, _ = published
    model = package.load(checkpoint)
    prompt, n_tokens = "time light", len(model.tokenizer.encode("time light"))
    with running([model]) as server:
        found = server.client.completions.create(
            model="p_expert", prompt=prompt, max_tokens=8, temperature=0, echo=True, logprobs=0
        )
    assert found.usage.prompt_tokens == n_tokens + 1
    expected = prompt + model.generate(prompt, temperature=0.0, max_new_tokens=8)
    (choice,) = found.choices
    assert choice.text == expected
    assert choice.logprobs.text_offset[0] == 0
    assert choice.logprobs.tokens[0] == model.tokenizer.decode(model.tokenizer.encode(prompt)[:1])
    logits = model.logits(torch.tensor([model.tokenizer.encode_prompt(prompt)]))[0].double().log_softmax(-1)
    expected_scores = [float(logits[i, token]) for i, token in enumerate(model.tokenizer.encode(prompt))]
    assert choice.logprobs.token_logprobs[:n_tokens] == pytest.approx(expected_scores, abs=1e-4)


def test_a_gguf_file_says_so(published: tuple[Path, Path, Any], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    _, checkpoint, _ = published
    tokenizer = package.load(checkpoint).tokenizer
    file = export_gguf(checkpoint, tmp_path / "a.gguf").file
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.bos_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    where = ["--name", "again", "--checkpoint-dir", str(tmp_path)]
    assert run(["checkpoints", "import", str(file), *where]) == 0
    again = package.load(tmp_path / "again_expert.pt").tokenizer
    for text in TEXTS:
        assert again.encode_prompt(text) == tokenizer.encode_prompt(text)
