from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanothink.config.run import resolve_config
from nanothink.data.corpus import find_corpus
from nanothink.data.tokenizer import Tokenizer, load_tokenizer
from nanothink.data.tokens import TokenisedCorpus, tokenise
from nanothink.inference.evaluate import Evaluation, EvaluationStopped, Routing, Score, evaluate_model
from nanothink.models import build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.precision import Precision

LENGTH = 16
EXACT = Precision(torch.device("cpu"), torch.float32, "test")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(str(tiny_tokenizer))


@pytest.fixture(scope="module")
def tokens(tiny_corpus: Path, tokenizer: Tokenizer) -> TokenisedCorpus:
    return tokenise(find_corpus(tiny_corpus), tokenizer, val_split=0.1)


@pytest.fixture
def model(tokenizer: Tokenizer) -> LanguageModel:
    config = resolve_config(
        assignments=[
            "model.d_model=16",
            f"model.max_seq_len={LENGTH}",
            "transformer.n_layers=1",
            "transformer.n_heads=2",
        ]
    ).config
    torch.manual_seed(1)
    model = build_model("transformer", config, tokenizer.vocab_size)
    for parameter in model.parameters():  # a fresh head is zero, and every model would score the same
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def score(model: LanguageModel, tokens: TokenisedCorpus, **changed: object) -> Evaluation:
    arguments = {"length": LENGTH, "batch_size": 4, "precision": EXACT} | changed
    return evaluate_model(model, tokens.val, **arguments)  # type: ignore[arg-type]


def test_it_equals_a_plain_sum_over_the_documents_tokens(
    model: LanguageModel, tokens: TokenisedCorpus, tokenizer: Tokenizer, tiny_corpus: Path
) -> None:
    """Bits per byte from first principles: read the files, find the held-out texts, add up by hand."""
    evaluation = score(model, tokens)
    for domain, stream in tokens.val.items():
        texts = [
            json.loads(line)["text"]
            for line in (tiny_corpus / domain / "texts.jsonl").read_text().splitlines()
        ]
        held_out, sequence = [], []
        wanted = [stream.block(i, LENGTH)[1] for i in range(stream.n_blocks(LENGTH))]
        joined = [int(t) for block in wanted for t in block if t >= 0]
        for text in texts:
            own = [*tokenizer.encode(text), tokenizer.eos_id]
            if any(joined[i : i + len(own)] == own for i in range(len(joined))):
                held_out.append(text)
                sequence += own
        assert sequence == joined
        nats = 0.0
        previous = [tokenizer.eos_id, *sequence]
        with torch.no_grad():
            for start in range(0, len(sequence), LENGTH):
                inputs = torch.tensor([previous[start : start + LENGTH]])[:, : len(sequence) - start]
                targets = torch.tensor(sequence[start : start + LENGTH])
                nats += float(F.cross_entropy(model.logits(inputs)[0].double(), targets, reduction="sum"))
        n_bytes = sum(len(text.encode()) for text in held_out)
        found = evaluation.domains[domain]
        assert (found.tokens, found.n_bytes) == (len(sequence), n_bytes)
        assert found.nats == pytest.approx(nats, rel=1e-5)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(nats / len(sequence)), rel=1e-5)


def test_it_is_deterministic(model: LanguageModel, tokens: TokenisedCorpus) -> None:
    assert score(model, tokens) == score(model, tokens)


def test_the_batch_size_does_not_matter(model: LanguageModel, tokens: TokenisedCorpus) -> None:
    one, many = score(model, tokens, batch_size=1), score(model, tokens, batch_size=64)
    assert one.overall.nats == pytest.approx(many.overall.nats, rel=1e-6)


def test_a_cap_keeps_whole_documents(model: LanguageModel, tokens: TokenisedCorpus) -> None:
    capped = score(model, tokens, max_tokens=100)
    for domain, found in capped.domains.items():
        assert (found.tokens, found.n_bytes) == tokens.val[domain].prefix(100)
    assert capped.overall.tokens < score(model, tokens).overall.tokens


def test_overall_weighs_domains_by_size() -> None:
    evaluation = Evaluation({"a": Score(30.0, 10, 40), "b": Score(10.0, 10, 10)})
    assert evaluation.overall == Score(40.0, 20, 50)
    assert evaluation.overall.loss == 2.0


def test_it_stops_when_asked_and_leaves_the_model_as_it_was(
    model: LanguageModel, tokens: TokenisedCorpus
) -> None:
    model.train()
    calls = iter([False, False, True])
    with pytest.raises(EvaluationStopped):
        score(model, tokens, batch_size=1, should_stop=lambda: next(calls))
    assert model.training


def test_progress_reaches_its_total(model: LanguageModel, tokens: TokenisedCorpus) -> None:
    seen: list[tuple[int, int]] = []
    evaluation = score(model, tokens, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (evaluation.overall.tokens, evaluation.overall.tokens)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_loss_beyond_what_a_float_can_hold_is_still_a_perplexity() -> None:
    assert math.isfinite(Score(1e6, 1, 1).perplexity)


@pytest.mark.parametrize("n_shares", [2, 3, 50])
def test_shares_add_up_to_the_whole(model: LanguageModel, tokens: TokenisedCorpus, n_shares: int) -> None:
    """As processes share it out: no batch is left out, none scored twice. With 50 some have nothing to do."""
    shares = [score(model, tokens, share=(number, n_shares)) for number in range(n_shares)]
    given: list[list[float]] = []
    for share in shares:
        share.added(lambda own: given.append([*own]) or own)  # type: ignore[func-returns-value]
    sums = [math.fsum(column) for column in zip(*given, strict=True)]
    added, whole = shares[-1].added(lambda own: sums), score(model, tokens)
    for domain, expected in whole.domains.items():
        found = added.domains[domain]
        assert (found.tokens, found.n_bytes) == (expected.tokens, expected.n_bytes)
        assert found.nats == pytest.approx(expected.nats, rel=1e-9)


def test_the_shares_of_routing_add_up_too() -> None:
    own = Evaluation({"d": Score(2.0, 4, 8)}, {10: 0.5}, {"d": Routing({"a": 1.5, "b": 2.5}, 0.25, 4)})
    added = own.added(lambda values: [2 * value for value in values])
    assert added == Evaluation(
        {"d": Score(4.0, 4, 8)}, {10: 0.5}, {"d": Routing({"a": 3.0, "b": 5.0}, 0.5, 8)}
    )
    assert isinstance(added.routing["d"].tokens, int)
