"""A model with a chat template: it keeps it wherever it goes, and answers by it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

import nanothink
from nanothink.cli.app import run
from nanothink.cli.conversation import Conversation
from nanothink.data.chat import ChatFormat
from nanothink.data.encoding import Tokenizer
from nanothink.data.tokenizer import load_tokenizer, save_tokenizer
from nanothink.runs.trained_model import TrainedModel

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [{"role": "user", "content": "the moon"}]


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``instruct_expert.pt``, imported from a random model as ``transformers`` writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat")
    backend = tokenizers.Tokenizer.from_str(load_tokenizer(str(tiny_tokenizer)).to_state()["tokenizer_json"])
    backend.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    chat = ChatFormat.of(TEMPLATE, {"bos_token": "<s>"})
    tokenizer = Tokenizer(backend, "instruct", "<|endoftext|>", chat)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **shape)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1 if "norm" in name else 8)
    model.save_pretrained(folder / "instruct")
    save_tokenizer(tokenizer, folder / "instruct")
    assert run(["checkpoints", "import", str(folder / "instruct"), "--checkpoint-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> TrainedModel:
    return nanothink.load(folder / "instruct_expert.pt", device="cpu")


def kept(model: TrainedModel) -> tuple[str, str | None]:
    chat = model.tokenizer.chat
    assert chat is not None
    return chat.template, dict(chat.special_tokens).get("bos_token")


def test_the_template_goes_wherever_the_model_goes(
    folder: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    first = folder / "instruct_expert.pt"
    where = ["--checkpoint-dir", str(tmp_path)]
    little = [
        "--max-steps",
        "2",
        "--set",
        "train_expert.batch_size=2",
        "--set",
        "train_expert.sample_tokens=0",
    ]
    data = ["--data-dir", str(tiny_corpus), "--set", "train_expert.eval_max_tokens=200", "--domains", "tales"]
    assert run(["pretrain", "transformer", "--init", str(first), "--name", "on", *where, *little, *data]) == 0
    assert run(["checkpoints", "export", str(tmp_path / "on_expert.pt"), "--to", str(tmp_path / "out")]) == 0
    file = tmp_path / "out.gguf"
    gguf = ["--format", "gguf", "--to", str(file)]
    assert run(["checkpoints", "export", str(first), *gguf]) == 0
    assert run(["checkpoints", "import", str(file), "--name", "back", *where]) == 0
    for path in (first, tmp_path / "on_expert.pt", tmp_path / "out", tmp_path / "back_expert.pt"):
        assert kept(nanothink.load(path)) == (TEMPLATE, "<s>")
    theirs: Any = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    ours = nanothink.load(tmp_path / "out").chat.prompt(ASKED)
    assert theirs.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False) == ours
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert [theirs.decode([end]) for end in ends] == ["<|endoftext|>", "<|im_end|>"]
    capsys.readouterr()
    assert run(["checkpoints", "show", str(tmp_path / "on_expert.pt")]) == 0
    assert "the model's own" in capsys.readouterr().out


def test_a_message_is_answered_alone_or_from_a_pipe(
    folder: Path,
    loaded: TrainedModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    plain = ["generate", "--chat", "-c", str(folder / "instruct_expert.pt"), "-t", "0", "-n", "8"]
    capsys.readouterr()
    (expected,) = loaded.answer([ASKED], temperature=0, max_new_tokens=8)
    assert run([*plain, "the moon"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    (tmp_path / "piped").write_text("the moon\n")
    with (tmp_path / "piped").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert run(plain) == 0
    assert capsys.readouterr().out == expected + "\n"
    told = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert run([*plain, "the moon", "--system", "Be brief.", "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    (answer,) = loaded.answer([told], temperature=0, max_new_tokens=8)
    assert sample == {"messages": told, "text": answer}
    assert answer != expected


def test_an_answer_ends_with_the_turn(loaded: TrainedModel) -> None:
    end = loaded.tokenizer.special_ids["<|im_end|>"]
    with torch.no_grad():
        head = loaded.model.head_weight
        before, state = head.clone(), loaded.model.hidden(torch.tensor([loaded.chat.prompt(ASKED)]))[0, -1]
        head[end] = state * 100
        assert loaded.answer([ASKED, ASKED], temperature=0) == ["", ""]
        assert len(loaded.answer([ASKED], temperature=0, stop_at_eos=False, max_new_tokens=3)[0]) > 3
        head.copy_(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat"], "--chat needs a message"),
        (["--system", "x", "hi"], "--system is for --chat"),
        (["--chat", "hi", "--show-routing"], "--chat is for answers"),
        (["--chat", "--interactive"], "--interactive needs a terminal"),
    ],
)
def test_what_does_not_go_with_a_chat_is_said(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(["generate", "-c", str(folder / "instruct_expert.pt"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_template_says_what_to_do(
    folder: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    for file in (folder / "instruct").iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert run(["checkpoints", "import", str(tmp_path / "base"), "--checkpoint-dir", str(tmp_path)]) == 0
    assert run(["generate", "--chat", "hi", "-c", str(tmp_path / "base_expert.pt")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "base_expert.pt has no chat template" in error
    assert "nanothink checkpoints import" in error


Typed = Callable[..., list[dict[str, str]]]


@pytest.fixture
def typed(loaded: TrainedModel) -> Typed:
    """The conversation after a session in which these lines are typed."""

    def call(*lines: str, text: str = "", system: str | None = None) -> list[dict[str, str]]:
        left: Iterator[str] = iter(lines)

        def read(_: str) -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        settings = {"max_new_tokens": 4, "seed": 1, "stop_at_eos": False}
        session = Conversation(loaded, settings, read=read, text=text, system=system)
        session.run()
        return session.messages

    return call


def test_a_dialogue_has_its_history(typed: Typed, loaded: TrainedModel) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 4, "seed": 1, "stop_at_eos": False}
    first = [*ASKED, {"role": "assistant", "content": loaded.answer([ASKED], **settings)[0]}]
    assert typed("the moon") == typed(text="the moon") == first
    second = [*first, {"role": "user", "content": "/why"}]
    answer = {"role": "assistant", "content": loaded.answer([second], **settings)[0]}
    assert typed("the moon", "//why") == [*second, answer]
    assert typed("the moon", "//why", "/undo") == first
    assert typed("the moon", "/undo", "/undo") == []
    assert typed("the moon", "/again") == first
    told = typed("/system Be brief.", "the moon")
    assert told == typed("the moon", system="Be brief.")
    assert told[0] == {"role": "system", "content": "Be brief."}
    assert typed("the moon", '"""a', 'b"""')[2]["content"] == "a\nb"


def test_a_dialogue_is_saved_as_a_record(
    typed: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = typed(
        "the moon", f"/save {tmp_path / 'talk.jsonl'}", "/show", "", "/again x", "/nothing", "/set"
    )
    assert json.loads((tmp_path / "talk.jsonl").read_text())["messages"] == messages[:2]
    shown = capsys.readouterr()
    assert "user: the moon" in shown.out
    assert "nothing to answer" in shown.err
    assert "No command 'nothing'" in shown.err
    monkeypatch.setenv("EDITOR", "sed -i s/moon/stone/")
    assert typed("the moon", "/edit")[0]["content"] == "the stone"
