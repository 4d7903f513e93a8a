"""Continuing prompts: rows on their own, past the context, and text that never shows half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from nanothink.config import ModelConfig, TransformerConfig
from nanothink.errors import UsageError
from nanothink.inference.generate import StreamDecoder, generate, window_start
from nanothink.inference.sampling import SamplingConfig
from nanothink.models.contract import State
from nanothink.models.transformer import Transformer

VOCAB, EOS = 37, 36
FOREVER = {"stop_at_eos": False}


class Recording(Transformer):
    """Keeps the logits of every step, and how many rows and tokens it was given."""

    def start(self, batch_size: int):
        self.started = [*getattr(self, "started", []), batch_size]
        return super().start(batch_size)

    def step(self, tokens: Tensor, state: State) -> Tensor:
        logits = super().step(tokens, state)
        self.seen = [*getattr(self, "seen", []), (tuple(tokens.shape), logits)]
        return logits


def build(*, context: int = 64, seed: int = 0) -> Recording:
    torch.manual_seed(seed)
    shape = TransformerConfig(n_layers=2, n_heads=2)
    model = Recording(VOCAB, ModelConfig(d_model=16, max_seq_len=context), shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(EOS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: Transformer, prompts: Sequence[Sequence[int]], **settings: object) -> list[list[int]]:
    defaults = {"max_new_tokens": 20, "seed": 7}
    return generate(model, prompts, SamplingConfig.model_validate(defaults | settings), eos_id=EOS)


def test_greedy_is_the_argmax_of_the_uncached_forward() -> None:
    model, text = build(), prompt(5)
    for _ in range(12):
        text.append(int(model.logits(torch.tensor([text]))[0, -1].argmax()))
    assert run(model, [prompt(5)], temperature=0, max_new_tokens=12, **FOREVER) == [text[5:]]


def test_the_seed_decides() -> None:
    model = build()
    assert run(model, [prompt(5)], **FOREVER) == run(model, [prompt(5)], **FOREVER)
    assert run(model, [prompt(5)], **FOREVER) != run(model, [prompt(5)], seed=8, **FOREVER)
    free = [run(model, [prompt(5)], seed=None, **FOREVER)[0] for _ in range(3)]
    assert free[0] != free[1] or free[1] != free[2]


def test_rows_of_one_prompt_differ() -> None:
    first, second = run(build(), [prompt(5), prompt(5)], **FOREVER)
    assert first != second


@pytest.mark.parametrize("lengths", [(3, 11, 5, 5), (1, 40), (0, 2, 0), (30, 2, 17)])
@pytest.mark.parametrize("context", [64, 16])
def test_a_row_gives_the_same_text_alone_and_in_a_batch(lengths: tuple[int, ...], context: int) -> None:
    """With prompts longer than the context too, and texts that outgrow it."""
    model = build(context=context)
    prompts = [prompt(length, seed=length + i) for i, length in enumerate(lengths)]
    together = run(model, prompts, max_new_tokens=30, repetition_penalty=1.2)
    for row, own in enumerate(prompts):
        assert run(model, [own], max_new_tokens=30, repetition_penalty=1.2, seed=7 + row) == [together[row]]


@pytest.mark.parametrize("context", [2, 3, 8, 9])
@pytest.mark.parametrize("n_prompt", [1, 8, 13])
def test_each_step_past_the_context_equals_the_uncached_window(context: int, n_prompt: int) -> None:
    model = build(context=context)
    text = prompt(n_prompt)
    new = run(model, [text], max_new_tokens=30, **FOREVER)[0]
    assert len(new) == 30
    text = text + new
    assert len(model.seen) == 30
    for i, (_, logits) in enumerate(model.seen):
        read = n_prompt + i
        start = window_start(read, context)
        assert max(1, context // 2) <= read - start <= context or start == 0
        uncached = model.logits(torch.tensor([text[start:read]]))[:, -1]
        torch.testing.assert_close(logits, uncached.detach(), rtol=1e-4, atol=1e-4)


def test_a_window_starts_anew_only_when_full_and_keeps_half() -> None:
    assert [window_start(n, 8) for n in range(1, 20)] == [0] * 8 + [5] * 5 + [10] * 5 + [15]
    assert window_start(10**9, None) == 0


def test_the_prompt_is_read_in_one_pass() -> None:
    model = build()
    run(model, [prompt(30), prompt(33)], max_new_tokens=3, **FOREVER)
    assert [shape for shape, _ in model.seen] == [(2, 30), *[(2, 1)] * 5]


def test_an_empty_prompt_begins_a_document() -> None:
    model = build()
    assert run(model, [[]], **FOREVER) == run(model, [[EOS]], **FOREVER)
    assert run(model, []) == []


def test_eos_ends_a_row_and_is_not_part_of_it() -> None:
    model = build()
    with torch.no_grad():  # EOS after exactly the tokens 0..17, whatever came before
        model.embedding.weight.zero_()
        for block in model.model.layers:
            for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                block.get_parameter(name).zero_()
        model.embedding.weight[:18, 0] = 1
        model.embedding.weight[18:, 1] = 1
        model.head_weight.zero_()
        model.head_weight[EOS, 0] = 5
        model.head_weight[20, 1] = 5
    events: list[tuple[int, int]] = []
    settings = SamplingConfig(temperature=0, max_new_tokens=4)
    found = generate(
        model, [[3], [30]], settings, eos_id=EOS, on_token=lambda row, t: events.append((row, t))
    )
    assert found == [[], [20] * 4]
    assert events == [(1, 20)] * 4
    assert run(model, [[3]], temperature=0, max_new_tokens=3, **FOREVER) == [[EOS, 20, 20]]
    model.seen.clear()
    run(model, [[3], [4]], temperature=0, max_new_tokens=50)
    assert len(model.seen) == 1  # nothing is computed once all are done


def test_finished_rows_leave_with_the_next_window() -> None:
    model = build(context=8)
    run(model, [prompt(2), prompt(30)], max_new_tokens=3, **FOREVER)  # the first is done at 5 tokens
    assert model.started[0] == 2
    assert set(model.started[1:]) == {1}


def test_tokens_stream_in_order_as_they_are_drawn() -> None:
    events: list[tuple[int, int]] = []
    settings = SamplingConfig(max_new_tokens=9, seed=1, stop_at_eos=False)
    prompts = [prompt(3), prompt(6)]
    found = generate(build(), prompts, settings, eos_id=EOS, on_token=lambda row, t: events.append((row, t)))
    assert [[t for row, t in events if row == i] for i in range(2)] == found
    assert [row for row, _ in events[:6]] == [0, 0, 0, 0, 1, 0]  # the longer prompt starts three steps later


def test_modes_and_global_random_numbers_are_left_as_they_were() -> None:
    model = build().train()
    model.model.layers[0].eval()  # such as a frozen part
    before = torch.get_rng_state()

    def stop(row: int, token: int) -> None:
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [prompt(4)], SamplingConfig(stop_at_eos=False), eos_id=EOS, on_token=stop)
    run(model, [prompt(4)], seed=None)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not any(module.training for module in model.model.layers[0].modules())
    assert all(module.training for module in model.model.layers[1].modules())
    model.loss(torch.tensor([prompt(4)]), torch.tensor([prompt(4)])).backward()  # still trainable afterwards


def test_a_token_of_another_vocabulary_is_named() -> None:
    for bad in (VOCAB, -1):
        with pytest.raises(UsageError, match=rf"prompt 1 has token {bad}, .* 0 to {VOCAB - 1}"):
            run(build(), [[1], [2, bad]])


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    """Byte-level BPE: one token a byte, and the merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TEXT = "naïve café 日本語 – 🦜🔧 e\u0301 \u200d zwölf, ok\n\ttab"


@pytest.mark.parametrize("merges", [(), (("Ġ", "Ġ"), ("Ã", "¯"), ("ð", "Ł"), ("ç", "ļ"))])
def test_streamed_text_is_the_text_and_never_half_a_character(merges: Sequence[tuple[str, str]]) -> None:
    tokenizer = byte_tokenizer(merges)
    ids = tokenizer.encode(TEXT).ids
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(token) for token in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == TEXT
    assert stream.flush() == ""
    so_far = ""
    for i, part in enumerate(parts):  # as early as it can be: nothing whole is held back
        so_far += part
        assert so_far == tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")


def test_bytes_that_are_no_text_come_out_in_the_end() -> None:
    tokenizer = byte_tokenizer()
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[s] for s in ("ð", "Ł", "ÿ", "a", "ÿ", "ÿ", "ÿ", "ÿ", "ÿ", "b", "ð", "Ł")]
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""
    assert "b" in parts[-3]


class Bytes:
    """Decodes tokens that are bytes, and counts them."""

    def __init__(self, decode: Callable[[bytes], str]) -> None:
        self.decode_bytes = decode
        self.counts: list[int] = []

    def decode(self, ids: list[int], /) -> str:
        self.counts.append(len(ids))
        return self.decode_bytes(bytes(ids))


def utf8(data: bytes) -> str:
    return data.decode("utf-8", "replace")


PIECES = [bytes([value]) for value in (0, 0x41, 0x7F, 0x80, 0xBF, 0xC0, 0xE2, 0xF0, 0xF4, 0xFF)]
PIECES += [piece.encode() for piece in ("a", "é", "€", "🦜", "\ufffd", "e\u0301")]


@given(st.lists(st.sampled_from(PIECES), max_size=120).map(b"".join))
@settings(max_examples=400, deadline=None)
def test_the_stream_of_any_bytes_is_their_text(data: bytes) -> None:
    stream = StreamDecoder(Bytes(utf8))
    parts = [stream.push(value) for value in data]
    assert "".join(parts) + stream.flush() == utf8(data)


@pytest.mark.parametrize("unit", [b"\xff", b"\xf0", b"\xf0\x9f\x98", bytes(range(0x80, 0x100))])
@pytest.mark.parametrize("decode", [utf8, lambda data: "\ufffd" * len(data)])
def test_bytes_that_are_no_text_cost_no_more_the_more_there_are(
    unit: bytes, decode: Callable[[bytes], str]
) -> None:
    data = (unit * 4000)[:4000]
    decoder = Bytes(decode)
    stream = StreamDecoder(decoder)
    parts = [stream.push(value) for value in data]
    assert "".join(parts) + stream.flush() == decode(data)
    assert max(len(part) for part in parts) <= 32  # shown on the way, not at the end
    assert sum(decoder.counts) < 100 * len(data)


def test_a_decoder_that_never_settles_is_not_asked_for_ever_more() -> None:
    decoder = Bytes(lambda data: "x\ufffd")
    stream = StreamDecoder(decoder)
    assert "".join(stream.push(0) for _ in range(2000)).startswith("x")
    assert max(decoder.counts) < 200


def test_characters_spelt_in_byte_tokens_come_out_whole() -> None:
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    names = [f"<0x{value:02X}>" for value in range(256)]

    class Fallback:
        def decode(self, ids: list[int], /) -> str:
            return decoder.decode([names[value] for value in ids])

    stream = StreamDecoder(Fallback())
    parts = [stream.push(value) for value in (TEXT * 3).encode()]
    assert "".join(parts) + stream.flush() == TEXT * 3
    assert not any("\ufffd" in part for part in parts)


def test_a_replacement_character_in_the_text_is_kept() -> None:
    tokenizer = byte_tokenizer()
    text = "a\ufffd\ufffd\ufffd\ufffdb\ufffd"
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(parts) + stream.flush() == text


def test_spaces_survive_a_decoder_that_strips_the_first() -> None:
    words = ["▁the", "▁cat", "s", "▁sat"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in (0, 1, 2, 3)] == ["the", " cat", "s", " sat"]
