"""Trained models of every kind, and a server of them in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from forking_shell import quick
from openai import OpenAI
from report.conftest import Browser, find_browser, running_browser

import nanothink
from nanothink.cli.app import run
from nanothink.runs.trained_model import TrainedModel
from nanothink.serve.app import Access
from nanothink.serve.endpoints import Limits
from nanothink.serve.server import access, build_server, listen, served_models, url_of
from nanothink.vector_store.contents import VectorStore


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    models: dict[str, TrainedModel]
    failures: list[str]
    """What it complained of."""

    @cached_property
    def client(self) -> Any:  # its types know no field that is not OpenAI's
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


Serve = Callable[..., AbstractContextManager[Running]]
"""Start a server of one's own, for the time of a block."""


@pytest.fixture(scope="session")
def checkpoints(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of every kind, a vector store beside NanoThink's."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick(steps=8, max_keys=2000).items():
            patch.setenv(name, value)
        where = ["--checkpoint-dir", str(folder), "--data-dir", str(tiny_corpus)]
        for kind in ("transformer", "state_space", "diffuser"):
            assert run(["pretrain", kind, *where, "--tokenizer", str(tiny_tokenizer)]) == 0
        assert run(["train-mla", *where, "--use-vector-store"]) == 0
    return folder


@pytest.fixture(scope="session")
def models(checkpoints: Path) -> list[TrainedModel]:
    """Every kind, with heads that prefer something: a few steps leave them near zero."""
    names = ("transformer_expert", "state_space_expert", "diffuser_expert", "nanothink_mla")
    loaded = [nanothink.load(checkpoints / f"{name}.pt", device="cpu") for name in names]
    store = loaded[-1].model.vector_store
    assert isinstance(store, VectorStore)
    # All keys count: after a few steps they are so alike that rounding would decide who is the last of eight.
    store.n_neighbours = store.index.n_keys
    for one in loaded:
        with torch.no_grad():
            chance = torch.Generator().manual_seed(1)
            one.model.head_weight.copy_(torch.randn(one.model.head_weight.shape, generator=chance) * 0.3)
    return loaded


@contextmanager
def running(
    models: list[TrainedModel],
    *,
    allowed: Access | None = None,
    limits: Limits | None = None,
    template: str | None = None,
) -> Iterator[Running]:
    bound, ready = listen("127.0.0.1", 0), threading.Event()
    found = Running(url_of(bound), {one.path.stem: one for one in models}, [])
    server = build_server(
        served_models(models, template),
        allowed or access("127.0.0.1", None, ()),
        limits or Limits(),
        note=found.failures.append,
        on_ready=ready.set,
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    assert ready.wait(30)
    yield found
    server.should_exit = True
    thread.join(90)  # it drains for a minute at most
    assert not thread.is_alive()
    assert found.failures == []


@pytest.fixture(scope="session")
def server(models: list[TrainedModel]) -> Iterator[Running]:
    with running(models) as found:
        yield found


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    command = find_browser()
    if command is None:
        pytest.skip("no Chromium here: the page is not looked at (Debian: apt-get install chromium)")
    with running_browser(command, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="session")
def serve() -> Serve:
    return running
