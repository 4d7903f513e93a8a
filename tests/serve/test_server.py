"""The server itself: who may ask, limits, clients that leave, the end, and what comes malformed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanothink.errors import UsageError
from nanothink.serve import model_thread
from nanothink.serve.endpoints import Limits
from nanothink.serve.server import access, is_loopback, listen, served_models

if TYPE_CHECKING:
    from serve.conftest import Running, Serve

JSON = {"Content-Type": "application/json"}
LONG = {"prompt": "The", "max_tokens": 4000, "ignore_eos": True}


def ask(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of an answer; bytes are sent as they are, other bodies as JSON."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body)
    sent_headers = ({} if body is None else JSON) | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request("GET" if body is None else "POST", path, sent, sent_headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    kind = answer.headers.get("content-type", "")
    return answer.status, json.loads(content) if kind == "application/json" else content, dict(answer.headers)


def refused(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """Status and message of an error in OpenAI's shape."""
    status, answer, _ = ask(url, path, body, **headers)
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return status, answer["error"]["message"]


def n_texts(url: str) -> int:
    n: int = ask(url, "/health")[1]["texts"]
    return n


def until(url: str, wanted: int) -> None:
    """Wait for so many texts to be under way."""
    deadline = time.monotonic() + 20
    while n_texts(url) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def open_stream(url: str, body: Any) -> socket.socket:
    """A connection on which a text is being written."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname or "", address.port or 0))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(server: Running, stream: bool) -> None:
    connection = open_stream(server.url, {**LONG, "stream": stream, "n": 3})
    until(server.url, 3)
    connection.close()
    until(server.url, 0)


def test_a_full_queue_says_to_come_back(serve: Serve, server: Running) -> None:
    with serve([server.models["transformer_expert"]], limits=Limits(max_batch=1, max_texts=2)) as full:
        connections = [open_stream(full.url, LONG) for _ in range(2)]
        until(full.url, 2)
        status, answer, headers = ask(full.url, "/v1/completions", {"prompt": "a"})
        assert (status, answer["error"]["code"]) == (503, "server_overloaded")
        assert headers["retry-after"] == "1"
        for connection in connections:
            connection.close()
        until(full.url, 0)
        assert ask(full.url, "/v1/completions", {"prompt": "a"})[0] == 200


def test_bodies_have_bounds(serve: Serve, server: Running) -> None:
    with serve([server.models["transformer_expert"]], limits=Limits(body_bytes=1000)) as small:
        assert refused(small.url, "/v1/completions", {"prompt": "a" * 1000})[0] == 413
        assert ask(small.url, "/tokenize", {"prompt": "a" * 900})[0] == 200
    assert refused(server.url, "/v1/completions", {"prompt": list(range(5)) * 20_000})[0] == 400
    assert refused(server.url, "/v1/completions", b"{}", Content_Type="text/plain")[0] == 415
    assert refused(server.url, "/v1/completions", b"{")[0] == 400
    assert refused(server.url, "/v1/completions", b"[" * 100_000)[0] == 400
    assert refused(server.url, "/v1/completions", b"[]") == (400, "The body must be a JSON object.")
    assert refused(server.url, "/v1/completions", {})[1] == "prompt: Field required"


def test_a_key_is_asked_for_everywhere_but_at_the_door(serve: Serve, server: Running) -> None:
    allowed = access("127.0.0.1", "a secret", ())
    with serve([server.models["transformer_expert"]], allowed=allowed) as locked:
        for path in ("/v1/models", "/tokenizer_info", "/v1/completions", "/nowhere"):
            for given in ("", "Bearer", "Bearer wrong", "Basic a secret", "Bearer a secre\u00e9"):
                status, message = refused(locked.url, path, Authorization=given)
                assert status == 401
                assert "API key" in message
        assert ask(locked.url, "/v1/models", Authorization="Bearer a secret")[0] == 200
        assert ask(locked.url, "/health")[0] == 200
        assert ask(locked.url, "/")[0] == 200


def test_a_page_elsewhere_cannot_ask(server: Running) -> None:
    """Under a name of its own for this address, or as a request that browsers send unasked."""
    assert refused(server.url, "/v1/models", Host="evil.example")[0] == 421
    assert ask(server.url, "/v1/models", Host="localhost:1")[0] == 200
    assert ask(server.url, "/v1/models", Host="[::1]")[0] == 200
    _, _, headers = ask(server.url, "/v1/models", Origin="https://evil.example")
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_a_page_that_is_named_may_ask(serve: Serve, server: Running) -> None:
    allowed = access("127.0.0.1", None, ["https://mine.example"])
    with serve([server.models["transformer_expert"]], allowed=allowed) as opened:
        for origin, granted in (
            ("https://mine.example", "https://mine.example"),
            ("https://evil.example", None),
        ):
            assert (
                ask(opened.url, "/v1/models", Origin=origin)[2].get("access-control-allow-origin") == granted
            )


def test_other_addresses_need_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(UsageError, match="other machines reach this server, so it needs a key"):
            access(host, None, ())
    assert is_loopback("127.0.0.2")
    (tmp_path / "key").write_text("of a file\n")
    assert access("0.0.0.0", f"@{tmp_path / 'key'}", ()).api_key == "of a file"
    with pytest.raises(UsageError, match="cannot be read"):
        access("0.0.0.0", f"@{tmp_path / 'none'}", ())


def test_a_port_that_is_taken_is_said() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}: Address already in use.*--port {port + 1}"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_said(host: str) -> None:
    with pytest.raises(UsageError, match=r"no address of this machine.*--host 127\.0\.0\.1"):
        listen(host, 0)


def test_a_chat_template_is_the_models(serve: Serve, server: Running) -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"
    loaded = server.models["transformer_expert"]
    with serve([loaded], template=source) as templated:
        assert ask(templated.url, "/tokenizer_info")[1]["chat_template"] == source
        body = {"messages": [{"role": "user", "content": "The"}], "max_tokens": 8, "temperature": 0}
        answer = ask(templated.url, "/v1/chat/completions", body)[1]
        tokens = [*loaded.tokenizer.encode("<user>The"), loaded.tokenizer.eos_id]  # a template writes tokens
        (expected,) = loaded.continue_tokens([tokens], temperature=0, max_new_tokens=8)
        assert answer["choices"][0]["message"]["content"] == loaded.tokenizer.decode(expected)


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}", "{{ 1/0 }}"],
)
def test_a_template_reaches_nothing(serve: Serve, server: Running, source: str) -> None:
    with serve([server.models["transformer_expert"]], template=source) as templated:
        body = {"messages": [{"role": "user", "content": "The"}]}
        status, message = refused(templated.url, "/v1/chat/completions", body)
        assert status == 400
        assert message.startswith("The model's chat template does not take these messages")


def test_what_is_no_template_is_said(server: Running) -> None:
    with pytest.raises(UsageError, match="not valid Jinja"):
        served_models([server.models["transformer_expert"]], "{% if %}")


@pytest.mark.parametrize("role", ["tool", "teacher", ""])
def test_an_odd_role_is_refused(server: Running, role: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}, {"role": role, "content": "Hi"}]}
    status, message = refused(server.url, "/v1/chat/completions", body)
    assert status == 400
    assert message.startswith(f"messages.1.role: {role!r} is none of system")


SCHEMAS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    *("prompt", "messages", "tokens", "model", "max_tokens", "temperature", "top_p", "top_k", "n", "seed"),
    *("stop", "stream", "stream_options", "echo", "logprobs", "best_of", "return_weights", "top_logprobs"),
)
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


@settings(max_examples=60, deadline=None)
@given(
    path=st.sampled_from(PATHS),
    body=st.binary(max_size=40)
    | st.dictionaries(st.sampled_from(FIELDS), SCHEMAS, max_size=6)
    | st.builds(
        lambda fields: {"prompt": "a", "messages": [{"role": "user"}], "max_tokens": 2} | fields,
        st.dictionaries(st.sampled_from(FIELDS[3:]), SCHEMAS, max_size=2),
    ),
)
def test_whatever_comes_is_answered(server: Running, path: str, body: Any) -> None:
    """Without a failure of the server, which the fixture would report."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer, _ = ask(server.url, path, sent)
    assert status in (200, 400, 404)
    assert status == 200 or set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.fixture
def process(checkpoints: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The real command, and its address."""
    command = [
        sys.executable,
        "-m",
        "nanothink",
        "serve",
        "--port",
        "0",
        "--checkpoint-dir",
        str(checkpoints),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = running.stdout.readline()
        assert said.startswith("Serving nanothink_mla, "), said + running.communicate()[1]
        yield running, said.partition(" at ")[2].partition("/v1;")[0]
        running.kill()


def test_sigterm_finishes_what_is_under_way(process: tuple[subprocess.Popen[str], str]) -> None:
    running, url = process
    connection = open_stream(url, {"prompt": "The", "max_tokens": 300, "ignore_eos": True, "stream": True})
    assert connection.recv(10).startswith(b"HTTP/1.1 2")
    os.kill(running.pid, signal.SIGTERM)
    rest = b""
    while piece := connection.recv(1 << 16):
        rest += piece
    connection.close()
    assert b"data: [DONE]" in rest
    assert running.wait(30) == 0
    assert running.stderr is not None
    assert "Traceback" not in running.stderr.read()
    with pytest.raises(OSError):
        ask(url, "/health")


@pytest.mark.parametrize("kind", ["transformer_expert", "nanothink_mla"])
def test_a_document_cache_is_served_as_generate_uses_it(serve: Serve, server: Running, kind: str) -> None:
    cached = replace(server.models[kind], document_cache=True)
    prompts, body = ["The river and the river", "A"], {"max_tokens": 12, "ignore_eos": True, "seed": 5}
    with serve([cached]) as found:
        answer = ask(found.url, "/v1/completions", {**body, "prompt": prompts, "return_weights": True})[1]
        (model,) = ask(found.url, "/v1/models")[1]["data"]
        looked = ask(found.url, "/inspect", {"prompt": prompts[0]})[1]
        scored = ask(
            found.url,
            "/v1/completions",
            {"prompt": "The river", "max_tokens": 0, "echo": True, "logprobs": 0},
        )[1]
    chosen: dict[str, Any] = {
        "max_new_tokens": 12,
        "stop_at_eos": False,
        "seed": 5,
        "temperature": 1.0,
        "top_k": 0,
    }
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        assert choice["text"] == cached.generate(prompt, **chosen)
        assert len(choice["nanothink"]["weights"][0]) == len(model["components"])
    assert model["components"][-1] == "document_cache"
    assert set(looked["weights"]) == set(model["components"])
    ids = cached.tokenizer.encode("The river")
    expected = cached.decoder.logits(torch.tensor([ids]))[0].log_softmax(-1)
    values = scored["choices"][0]["logprobs"]["token_logprobs"]
    assert values[-1] == pytest.approx(float(expected[-2, ids[-1]]), abs=1e-4)


def test_a_long_turn_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_thread, "_TURN_SECONDS", 0.1)
    failures: list[BaseException] = []
    thread = model_thread.ModelThread({}, max_batch=1, max_texts=1, on_failure=failures.append)
    under_way, may_end = threading.Event(), threading.Event()

    def turn() -> bool:
        under_way.set()
        return may_end.wait(8)

    async def ended_before_the_turn() -> bool:
        thread.start()
        turning = asyncio.ensure_future(thread.call(turn))
        await asyncio.to_thread(under_way.wait, 8)
        thread.stop()
        may_end.set()
        return await turning

    assert asyncio.run(ended_before_the_turn())
    assert failures == []
