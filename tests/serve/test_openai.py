"""The server under OpenAI's own client."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest
import torch
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params

from nanothink.serve.errors import RequestError
from nanothink.serve.requests import ChatRequest, CompletionRequest, parse

if TYPE_CHECKING:
    from serve.conftest import Running

KINDS = ("transformer_expert", "state_space_expert", "diffuser_expert", "nanothink_mla")
SAMPLING: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "seed": 5,
    "extra_body": {"top_k": 50, "ignore_eos": True},
}


def as_generate(server: Running, model: str, prompt: str, **changed: Any) -> str:
    """What ``nanothink generate`` writes with these settings."""
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "stop_at_eos": False, "max_new_tokens": 12}
    text: str = server.models[model].generate(prompt, **settings | changed)
    return text


@pytest.mark.parametrize("model", KINDS)
def test_a_completion_is_what_generate_writes(server: Running, model: str) -> None:
    found = server.client.completions.create(model=model, prompt="The river", max_tokens=12, **SAMPLING)
    assert found.choices[0].text == as_generate(server, model, "The river")
    assert found.choices[0].finish_reason == "length"
    assert found.model == model
    assert found.usage is not None
    n_prompt = len(server.models[model].tokenizer.encode("The river"))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (n_prompt, 12)


@pytest.mark.parametrize("model", KINDS)
def test_a_stream_says_the_same_piece_by_piece(server: Running, model: str) -> None:
    stream = server.client.completions.create(
        model=model,
        prompt="The river",
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **SAMPLING,
    )
    chunks = list(stream)
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == as_generate(server, model, "The river")
    assert len(texts) > 4
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_choices_are_drawn_with_seeds_of_their_own(server: Running) -> None:
    client, name = server.client, KINDS[0]
    found = client.completions.create(
        model=name, prompt=["The river", "A stone"], n=3, max_tokens=12, **SAMPLING
    )
    expected = [as_generate(server, name, p, seed=5 + i) for p in ("The river", "A stone") for i in range(3)]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == list(range(6))
    assert len(set(expected)) > 3


def test_a_prompt_may_be_token_ids(server: Running) -> None:
    client, tokenizer = server.client, server.models[KINDS[0]].tokenizer
    ids = [tokenizer.encode("The river"), tokenizer.encode("A")]
    for prompt in (ids[0], ids[:1]):
        found = client.completions.create(model=KINDS[0], prompt=prompt, max_tokens=12, **SAMPLING)
        assert found.choices[0].text == as_generate(server, KINDS[0], "The river")
    both = client.completions.create(model=KINDS[0], prompt=ids, max_tokens=12, **SAMPLING)
    assert both.choices[1].text == as_generate(server, KINDS[0], "A")


@pytest.mark.parametrize("model", KINDS)
def test_the_seed_gives_the_same_text_in_any_company(server: Running, model: str) -> None:
    """Forty requests of many lengths at once, and each of them alone."""
    prompts = [f"{'The river and the moon ' * (i % 5)}{i}" for i in range(40)]

    def ask(number: int) -> str:
        found = server.client.completions.create(
            model=model,
            prompt=prompts[number],
            max_tokens=3 + number % 40,
            seed=number,
            temperature=0.9,
        )
        return found.choices[0].text

    with ThreadPoolExecutor(40) as pool:
        together = list(pool.map(ask, range(40)))
    alone = [ask(number) for number in range(40)]
    assert together == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(server: Running, stream: bool) -> None:
    whole = as_generate(server, KINDS[0], "The river", max_new_tokens=40)
    stop = [whole[9:11], whole[20:23]]
    end = min(place for word in stop if (place := whole.find(word)) >= 0)
    asked = {"model": KINDS[0], "prompt": "The river", "max_tokens": 40, "stop": stop, **SAMPLING}
    found = server.client.completions.create(**asked, stream=stream)
    parts = [choice for part in (found if stream else [found]) for choice in part.choices]
    assert "".join(part.text for part in parts) == whole[:end]
    assert parts[-1].finish_reason == "stop"


@pytest.mark.parametrize("model", KINDS)
def test_generate_ends_at_a_stop_string_too(server: Running, model: str) -> None:
    loaded, pieces = server.models[model], [""] * 2
    settings: dict[str, Any] = {"max_new_tokens": 30, "seed": 5, "stop_at_eos": False}
    whole = loaded.generate(["The river", "A"], **settings)
    stop = [whole[0][9:11]]
    ends = [text.partition(stop[0])[0] for text in whole]

    def hear(row: int, piece: str) -> None:
        pieces[row] += piece

    assert loaded.generate(["The river", "A"], stop=stop, on_text=hear, **settings) == ends
    assert pieces == ends
    assert len(ends[0]) <= 9


def test_logprobs_are_the_models(server: Running) -> None:
    """In the legacy shape, with echo: the first token has none.

    Of an expert: a vector store of a text that repeats itself has ties, which rounding decides.
    """
    loaded = server.models["transformer_expert"]
    found = server.client.completions.create(
        model="transformer_expert", prompt="The river", max_tokens=3, echo=True, logprobs=2, temperature=0
    )
    choice = found.choices[0]
    assert choice.logprobs is not None
    tokens, values, best = (
        choice.logprobs.tokens,
        choice.logprobs.token_logprobs,
        choice.logprobs.top_logprobs,
    )
    assert tokens is not None
    assert values is not None
    assert best is not None
    assert choice.text.startswith("The river")
    ids = loaded.tokenizer.encode("The river")
    expected = loaded.logits(torch.tensor([ids]))[0].log_softmax(-1)
    assert values[0] is None
    for place in range(1, len(ids)):
        assert values[place] == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-4)
        assert max(best[place].values()) == pytest.approx(float(expected[place - 1].max()), abs=1e-4)
    assert values[len(ids)] == pytest.approx(float(expected[-1].max()), abs=1e-4)
    assert len(tokens) == len(values) == len(best) == len(ids) + 3
    offsets = choice.logprobs.text_offset
    assert offsets is not None
    assert [choice.text[o : o + len(t)] for o, t in zip(offsets, tokens, strict=True)] == tokens


def test_logprobs_of_long_texts_of_a_model_without_a_context(server: Running) -> None:
    loaded = server.models["state_space_expert"]
    text = "The river " * 200
    ids = loaded.tokenizer.encode(text)
    assert len(ids) > 600
    found = server.client.completions.create(
        model="state_space_expert", prompt=text, max_tokens=0, echo=True, logprobs=0
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    expected = loaded.logits(torch.tensor([ids]))[0].log_softmax(-1)
    total = sum(float(expected[place - 1, ids[place]]) for place in range(1, len(ids)))
    assert math.fsum(value for value in logprobs.token_logprobs if value is not None) == pytest.approx(
        total, rel=1e-4
    )
    assert found.choices[0].text == text
    assert found.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_without_a_template_continues_the_text(server: Running, stream: bool) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "The "},
        {"role": "user", "content": [{"type": "text", "text": "river"}]},
    ]
    found = server.client.chat.completions.create(
        model=KINDS[0], messages=messages, max_completion_tokens=12, stream=stream, **SAMPLING
    )
    if stream:
        chunks = list(found)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "length"
    else:
        text = found.choices[0].message.content
    assert text == as_generate(server, KINDS[0], "The river")


def test_a_chat_gives_logprobs(server: Running) -> None:
    found = server.client.chat.completions.create(
        model=KINDS[0],
        messages=[{"role": "user", "content": "The"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4
    for token in logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob
        assert len(token.top_logprobs) == 3


def test_models_are_listed(server: Running) -> None:
    client = server.client
    assert [model.id for model in client.models.list()] == list(KINDS)
    assert client.models.retrieve(KINDS[1]).id == KINDS[1]


def test_mistakes_are_said_as_openai_says_them(server: Running) -> None:
    client = server.client
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4'; there is transformer_expert"):
        client.completions.create(model="gpt-4", prompt="a")
    for wrong, field in (
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "word " * 40, "echo": True, "logprobs": 1}, "prompt"),
    ):
        asked: dict[str, Any] = {"model": KINDS[0], "prompt": "a", **wrong}
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**asked)
        assert caught.value.param == field, wrong
        assert caught.value.type == "invalid_request_error"


def test_an_unknown_field_is_named_with_the_nearest_known_one() -> None:
    for wrong, said in (
        ({"temprature": 1}, "temprature: unknown field; did you mean temperature?"),
        ({"max_token": 3, "prompt": 7}, "max_token: unknown field; did you mean max_tokens?"),
        (
            {"stream_options": {"include_use": True}},
            "stream_options.include_use: unknown field; did you mean include_usage?",
        ),
        ({"x" * 200: 1}, f"{'x' * 100}: unknown field; /openapi.json lists those that there are."),
    ):
        with pytest.raises(RequestError) as caught:
            parse(CompletionRequest, {"prompt": "a", **wrong})
        assert (caught.value.message, caught.value.code) == (said, "unknown_parameter")


def test_fields_that_clients_send_are_taken_unless_they_would_change_the_answer(server: Running) -> None:
    """Every field of OpenAI's own client is known; the harmless ones leave the text as it is."""
    sent: dict[str, Any] = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": True}
    sent |= {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None}
    found = server.client.completions.create(
        model=KINDS[0],
        prompt="The river",
        max_tokens=12,
        **SAMPLING | {"extra_body": {"top_k": 50, "ignore_eos": True, **sent}},
    )
    assert found.choices[0].text == as_generate(server, KINDS[0], "The river")
    for kind, of_client in (
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (ChatRequest, chat_params.CompletionCreateParamsBase),
    ):
        assert set(of_client.__annotations__) <= set(kind.model_fields)
    chat = {"messages": [{"role": "user", "content": "a"}]}
    harmless: dict[str, Any] = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    harmless |= {
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "prediction": {},
        "safety_identifier": "x",
    }
    parse(ChatRequest, chat | harmless)
    for name, value in (
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("logit_bias", {"5": 1}),
        ("reasoning_effort", "high"),
    ):
        with pytest.raises(RequestError, match=f"{name}: is not supported here; leave it out"):
            parse(ChatRequest, chat | {name: value})
