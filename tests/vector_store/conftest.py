"""A small corpus as tokens, and a vector store built of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import (
    EXACT,
    LENGTH,
    WIDTH,
    states,
)

from nanothink.config import VectorStoreConfig
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import Tokenizer, resolve_tokenizer
from nanothink.data.tokens import TokenisedCorpus, tokenise
from nanothink.reporter import SILENT, Reporter
from nanothink.vector_store.building import States, build, plan_build
from nanothink.vector_store.contents import Owner, VectorStore
from nanothink.vector_store.store import open_store


@pytest.fixture
def corpus_folder(tiny_corpus: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, folder)
    return folder


@pytest.fixture
def tokenizer(tiny_tokenizer: Path, corpus_folder: Path) -> Tokenizer:
    return resolve_tokenizer(str(tiny_tokenizer), find_corpus(corpus_folder), split=SplitRule(0.1))


@pytest.fixture
def read(corpus_folder: Path, tokenizer: Tokenizer) -> Callable[..., TokenisedCorpus]:
    def tokens(*domains: str, folder: Path | None = None) -> TokenisedCorpus:
        return tokenise(
            find_corpus(folder or corpus_folder, domains or None), tokenizer, split=SplitRule(0.1)
        )

    return tokens


@pytest.fixture
def owner(tokenizer: Tokenizer) -> Owner:
    return Owner("wise", "state_space", "d" * 32, tokenizer.fingerprint, WIDTH, LENGTH)


@pytest.fixture
def make(tmp_path: Path, owner: Owner, tokenizer: Tokenizer) -> Callable[..., VectorStore]:
    """Build a store, or add to one, and open it."""

    def made(
        tokens: TokenisedCorpus,
        settings: VectorStoreConfig = EXACT,
        store: VectorStore | None = None,
        by: States = states,
        folder: Path = tmp_path / "m.store",
        reporter: Reporter = SILENT,
    ) -> VectorStore:
        plan = plan_build(tokens, settings, owner, by, store)
        build(
            plan,
            folder,
            settings,
            owner,
            by,
            tokens,
            vocab_size=tokenizer.vocab_size,
            store=store,
            reporter=reporter,
        )
        return open_store(folder, settings, owner=owner, reporter=reporter)

    return made
