"""Records of messages: their shape, their tokens, and which of these are trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanothink.cli.app import run
from nanothink.data.chat import ChatEncoder, ChatFormat
from nanothink.data.chat_process import ChatTemplateError
from nanothink.data.corpus import find_corpus
from nanothink.data.encoding import Tokenizer
from nanothink.data.lines import Problem
from nanothink.data.record_file import write_records
from nanothink.data.records import Conversation, Record, iter_records
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer, train_on_corpus
from nanothink.data.tokens import IGNORE, TokenStream, tokenise
from nanothink.errors import DataError

SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why does it rain?"}
ANSWERED = {"role": "assistant", "content": "Water falls, é."}
TALK: dict[str, Any] = {"messages": [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED]}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(str(tiny_tokenizer))


def read(path: Path, *objects: object) -> tuple[list[Record], list[Problem], list[Problem]]:
    """Records, errors and warnings of lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in objects), "utf-8")
    errors: list[Problem] = []
    warnings: list[Problem] = []
    found = [one for _, one in iter_records(path, on_problem=errors.append, on_warning=warnings.append)]
    return found, errors, warnings


@pytest.mark.parametrize("id_", [7, 1.5, None])  # a float takes the slow path
def test_a_conversation_is_a_record(tmp_path: Path, id_: object) -> None:
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "Why does"}, {"type": "text", "text": " it rain?"}],
    }
    for messages in (TALK["messages"], [SYSTEM, parts, ANSWERED, ASKED, ANSWERED]):
        ((record,), errors, warnings) = read(
            tmp_path / "a.jsonl", {"messages": messages, "id": id_, "more": []}
        )
        assert [message._asdict() for message in record.messages] == TALK["messages"]
        assert record.text == "\n\n".join(message["content"] for message in TALK["messages"])
        assert record.n_bytes == 2 * len("Water falls, é.".encode())
        assert (errors, warnings) == ([], [])
        assert write_records(tmp_path / "b.jsonl", [record], overwrite=True) == 1
        assert list(iter_records(tmp_path / "b.jsonl", on_problem=errors.append)) == [(1, record)]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "is empty"),
        ({}, "must be a list"),
        (["hi"], "message 1 is no object"),
        ([{"from": "human", "value": "hi"}], "message 1 has no `role` but `from`"),
        ([{"role": "human", "content": "hi"}], "has the role 'human', .* Did you mean 'user'"),
        ([{"role": "asistant", "content": "hi"}], "Did you mean 'assistant'"),
        ([ASKED, ANSWERED, ASKED, {"role": "tool", "content": "x"}], "message 4 has the role 'tool'"),
        ([ASKED, {"role": "assistant", "content": " "}], "`content` of message 2 is empty"),
        ([ASKED, {"role": "assistant", "content": None, "tool_calls": []}], "message 2 must be a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1 has a part .* but 'image_url'"),
        (
            [ASKED, ASKED, ANSWERED],
            "message 2 is the user's after another of the user; the assistant's is due",
        ),
        ([SYSTEM, ANSWERED], "message 2 is the assistant's at the beginning; the user's is due"),
        ([ASKED, SYSTEM, ANSWERED], "message 2 is a system message; only the first"),
        ([SYSTEM, ASKED], "no message of the assistant"),
    ],
)
def test_what_is_wrong_with_messages_is_named(tmp_path: Path, messages: object, reason: str) -> None:
    found, (error,), _ = read(tmp_path / "a.jsonl", {"id": 3, "messages": messages})
    assert found == []
    assert re.search(reason, error.reason), error.reason
    assert (error.line, error.column) == (1, 23)


def test_a_text_beside_messages_counts_and_is_warned_of(tmp_path: Path) -> None:
    ((record,), errors, (warning,)) = read(tmp_path / "a.jsonl", {"text": "A text.", **TALK})
    assert (record, errors) == (Record(text="A text."), [])
    assert "the text counts" in warning.reason
    assert read(tmp_path / "b.jsonl", {"text": "A text.", "messages": 3})[2] == []


LONG = {"messages": [ASKED, {"role": "assistant", "content": "Rain " * 40}]}
LINES: list[dict[str, Any]] = [
    {"text": "The moon shines."},
    TALK,
    {"text": "So it does."},
    LONG,
    TALK | {"id": 1},
]


def written(root: Path, *lines: dict[str, Any], name: str = "a.jsonl") -> Path:
    (root / "talk").mkdir(parents=True, exist_ok=True)
    (root / "talk" / name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return root


def whole(root: Path, tokenizer: Tokenizer) -> TokenStream:
    return tokenise(find_corpus(root), tokenizer, split=None).train["talk"]


def reference(lines: list[dict[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of all records, and which are trained on, one after the other."""
    tokens: list[int] = []
    trained: list[bool] = []
    for line in lines:
        if "text" in line:
            ids = [*tokenizer.encode(line["text"]), tokenizer.eos_id]
            own = [True] * len(ids)
        else:
            ids, own = ChatEncoder(tokenizer).record(line["messages"])
        tokens, trained = tokens + ids, trained + own
    return tokens, trained


def check_blocks(stream: TokenStream, tokens: list[int], trained: list[bool], length: int, eos: int) -> None:
    inputs, targets = (
        np.concatenate(part)
        for part in zip(*(stream.block(i, length) for i in range(stream.n_blocks(length))), strict=True)
    )
    n = len(tokens)
    assert inputs[:n].tolist() == [eos, *tokens][:n]
    assert targets[:n].tolist() == [t if own else IGNORE for t, own in zip(tokens, trained, strict=True)]
    assert (targets[n:] == IGNORE).all()
    assert stream.n_targets == sum(trained) == int((targets != IGNORE).sum())
    all_targets = stream.with_all_targets()
    assert (all_targets.n_targets, all_targets.block(0, n)[1].tolist()) == (n, tokens)


@pytest.mark.parametrize("length", [5, 64])
def test_blocks_predict_answers_and_texts_alone(tmp_path: Path, tokenizer: Tokenizer, length: int) -> None:
    root = written(tmp_path, *LINES)
    written(root, {"text": "Another file, of text alone."}, name="b.jsonl")
    written(root, *LINES[1:], name="c.jsonl")
    lines = [*LINES, {"text": "Another file, of text alone."}, *LINES[1:]]
    expected = reference(lines, tokenizer)
    for _ in range(2):  # built, and from the cache
        stream = whole(root, tokenizer)
        check_blocks(stream, *expected, length, tokenizer.eos_id)
    texts = [line["text"] for line in lines if "text" in line]
    answers = [
        m["content"]
        for line in lines
        if "text" not in line
        for m in line["messages"][1:]
        if m["role"] == "assistant"
    ]
    assert stream.n_bytes == sum(len(text.encode()) for text in [*texts, *answers])


def test_masks_hold_over_chunks_and_after_much_text(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanothink.data.token_writer._CHUNK_DOCUMENTS", 2)
    lines: list[dict[str, Any]] = [{"text": f"Text {i} of a file."} for i in range(7)]
    lines += [{"messages": [ASKED, {"role": "assistant", "content": f"Answer {i}."}]} for i in range(9)]
    stream = whole(written(tmp_path, *lines), tokenizer)
    check_blocks(stream, *reference(lines, tokenizer), 32, tokenizer.eos_id)


def test_a_sample_keeps_the_mask_and_a_damaged_one_is_made_again(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = [{"messages": [ASKED, {"role": "assistant", "content": f"Answer {i}."}]} for i in range(30)]
    root = written(tmp_path, *lines)
    sample = whole(root, tokenizer).sample(300)
    assert 1 < sample.n_documents < 30
    ends = np.cumsum(sample.documents().n_tokens)
    _, alone = ChatEncoder(tokenizer).record(lines[0]["messages"])
    assert sample.trained(0, int(ends[0])).sum() == sum(alone)
    (file,) = (root / ".nanothink").rglob("*.tokens")
    content = file.read_bytes()
    bits = file.read_bytes().rindex(b'{"dtype"') - 40  # in the last page before the summary
    file.write_bytes(content[:bits] + bytes([content[bits] ^ 255]) + content[bits + 1 :])
    check_blocks(whole(root, tokenizer), *reference(lines, tokenizer), 64, tokenizer.eos_id)


def test_tokens_of_conversations_depend_on_the_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = ChatFormat.of("{% for m in messages %}<{{ m.content }}>{% endfor %}", {})
    other = tokenizer.with_chat(chat)
    root = written(tmp_path, *LINES)
    for one in (tokenizer, other, tokenizer):
        check_blocks(whole(root, one), *reference(LINES, one), 64, tokenizer.eos_id)
    assert whole(root, other).documents().keys.tolist() == whole(root, tokenizer).documents().keys.tolist()


def test_a_conversation_is_split_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [{"messages": [ASKED, {"role": "assistant", "content": f"Answer {i}."}]} for i in range(40)]
    tokens = tokenise(find_corpus(written(tmp_path, *lines)), tokenizer, split=SplitRule(0.2))
    train, val = tokens.train["talk"], tokens.val["talk"]
    assert (train.n_documents + val.n_documents, val.n_documents > 0) == (40, True)
    answers = sum(len(f"Answer {i}.") for i in range(40))
    assert train.n_bytes + val.n_bytes == answers
    assert tokens.has_conversations
    with pytest.raises(DataError, match="'talk' holds a single conversation"):
        tokenise(find_corpus(written(tmp_path / "one", TALK)), tokenizer, split=SplitRule(0.2))


def test_a_template_that_refuses_names_the_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    picky = "{{ raise_exception('No system role.') if messages[0].role == 'system' }}{{ messages }}"
    other = tokenizer.with_chat(ChatFormat.of(picky, {}))
    with pytest.raises(ChatTemplateError, match=r"a\.jsonl:2: .*No system role"):
        whole(written(tmp_path, {"text": "A text."}, TALK), other)


def test_tokenizers_are_trained_on_the_messages(tmp_path: Path) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Quixotic {i}?"},
                {"role": "assistant", "content": "Zymurgy."},
            ]
        }
        for i in range(40)
    ]
    trained = train_on_corpus(find_corpus(written(tmp_path, *lines)), vocab_size=300, split=SplitRule(0.1))
    assert len(trained.encode("Zymurgy")) <= 2
    assert len(trained.encode("Quixotic")) <= 2


def test_inspect_and_validate_know_conversations(
    tmp_path: Path, tiny_tokenizer: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(written(tmp_path, *LINES))
    assert run(["data", "inspect", "--data-dir", root, "--tokenizer", str(tiny_tokenizer), "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    n_targets = sum(reference(LINES, tokenizer)[1])
    assert [total[key] for key in ("n_conversations", "n_answers", "n_targets")] == [3, 5, n_targets]
    assert run(["data", "inspect", "--data-dir", root, "--tokenizer", str(tiny_tokenizer)]) == 0
    assert "Conversations" in capsys.readouterr().out
    assert run(["data", "validate", "--data-dir", root]) == 0
    written(tmp_path, TALK, {"messages": [ANSWERED]})
    assert run(["data", "validate", "--data-dir", root]) == 1
    assert "the user's is due" in capsys.readouterr().out


def test_a_conversation_can_be_made_in_python() -> None:
    record = Conversation.of(TALK)
    assert [message.role for message in record.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    with pytest.raises(ValueError, match="no message of the assistant"):
        Conversation.of({"messages": [ASKED]})
