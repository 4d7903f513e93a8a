from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reports import Told

from nanothink.config.run import resolve_config
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import Tokenizer, load_tokenizer
from nanothink.data.tokens import TokenisedCorpus, tokenise
from nanothink.inference.evaluate import (
    DocumentScores,
    Evaluation,
    EvaluationStopped,
    Routing,
    Score,
    evaluate_model,
)
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
    return tokenise(find_corpus(tiny_corpus), tokenizer, split=SplitRule(0.1))


@pytest.fixture
def model(tokenizer: Tokenizer) -> LanguageModel:
    return random_model(tokenizer, LENGTH)


def random_model(tokenizer: Tokenizer, length: int) -> LanguageModel:
    config = resolve_config(
        assignments=[
            "model.d_model=16",
            f"model.max_seq_len={length}",
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
        by_token: list[float] = []
        previous = [tokenizer.eos_id, *sequence]
        with torch.no_grad():
            for start in range(0, len(sequence), LENGTH):
                inputs = torch.tensor([previous[start : start + LENGTH]])[:, : len(sequence) - start]
                targets = torch.tensor(sequence[start : start + LENGTH])
                by_token += F.cross_entropy(
                    model.logits(inputs)[0].double(), targets, reduction="none"
                ).tolist()
        nats = sum(by_token)
        each = evaluation.documents[domain]
        for text, of_text, its_bytes in zip(held_out, each.nats, each.n_bytes, strict=True):
            n_own = len(tokenizer.encode(text)) + 1
            assert of_text == pytest.approx(sum(by_token[:n_own]), rel=1e-5)
            assert its_bytes == len(text.encode())
            del by_token[:n_own]
        assert not by_token
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


def test_a_text_shorter_than_a_block_takes_no_more_than_its_length(
    tokenizer: Tokenizer, tokens: TokenisedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(stream.n_tokens for stream in tokens.val.values())
    model = random_model(tokenizer, 4 * longest)
    read, hidden = set(), model.hidden

    def observed(x: torch.Tensor) -> torch.Tensor:
        read.add(x.shape[1])
        return hidden(x)

    monkeypatch.setattr(model, "hidden", observed)
    expected = score(model, tokens, length=longest).overall.bits_per_byte
    found = score(model, tokens, length=4 * longest)
    assert read == {stream.n_tokens for stream in tokens.val.values()}
    assert found.overall.bits_per_byte == pytest.approx(expected, rel=1e-6)


def test_a_cap_takes_a_sample_of_whole_documents(model: LanguageModel, tokens: TokenisedCorpus) -> None:
    capped = score(model, tokens, max_tokens=100)
    for domain, found in capped.domains.items():
        sample = tokens.val[domain].sample(100)
        assert (found.tokens, found.n_bytes) == (sample.n_tokens, sample.n_bytes)
        assert capped.documents[domain].n_bytes.sum() == found.n_bytes
    assert capped.overall.tokens < score(model, tokens).overall.tokens


def test_overall_weighs_domains_by_size() -> None:
    evaluation = Evaluation({"a": Score(30.0, 10, 40), "b": Score(10.0, 10, 10)})
    assert evaluation.overall == Score(40.0, 20, 50)
    assert evaluation.overall.loss == 2.0


def drawn(strata: list[tuple[int, float]], random: np.random.Generator, in_group: int = 1) -> Evaluation:
    """Documents of lengths far apart, each as hard as its domain but for chance, which each group shares."""
    documents = {}
    for name, (n_groups, nats_per_byte) in enumerate(strata):
        groups = np.repeat(random.integers(2**63, size=n_groups).astype(np.uint64), in_group)
        n_bytes = random.lognormal(7, 0.8, len(groups)).astype(np.int64) + 1
        hardness = np.repeat(random.lognormal(0, 0.2, n_groups), in_group)
        nats = n_bytes * nats_per_byte * hardness * random.lognormal(0, 0.05, len(groups))
        order = random.permutation(len(groups))
        documents[f"d{name}"] = DocumentScores(nats[order], n_bytes[order], groups[order])
    scores = {d: Score(float(of.nats.sum()), 1, int(of.n_bytes.sum())) for d, of in documents.items()}
    return Evaluation(scores, documents=documents)


@pytest.mark.parametrize("in_group", [1, 6])
@pytest.mark.parametrize("strata", [[(80, 1.0)], [(60, 0.5), (90, 1.5)]])
def test_the_standard_error_is_how_far_samples_lie_apart(
    strata: list[tuple[int, float]], in_group: int
) -> None:
    random = np.random.default_rng(1)
    samples = [drawn(strata, random, in_group) for _ in range(1500 if len(strata) == 1 else 1)]
    first = samples[0].documents
    said = np.mean([sample.standard_error() for sample in samples])
    if len(strata) == 1:
        apart = np.std([sample.overall.bits_per_byte for sample in samples])
        assert samples[0].standard_error("d0") == samples[0].standard_error()
    else:
        # Of given groups: how much comes from each domain is no chance, and is drawn here.
        sums = {}
        for d, of in first.items():
            own = np.unique(of.groups, return_inverse=True)[1]
            sums[d] = np.stack([np.bincount(own, of.nats), np.bincount(own, of.n_bytes)])
        resampled = []
        for _ in range(1500):
            chosen = [own[:, random.integers(own.shape[1], size=own.shape[1])] for own in sums.values()]
            nats, n_bytes = np.sum([own.sum(1) for own in chosen], 0)
            resampled.append(nats / math.log(2) / n_bytes)
        apart = np.std(resampled)
    assert said == pytest.approx(apart, rel=0.1)
    if in_group > 1:  # documents taken for independent would promise too much
        alone = {d: replace(of, groups=np.arange(len(of.nats), dtype=np.uint64)) for d, of in first.items()}
        promised = replace(samples[0], documents=alone).standard_error()
        assert promised is not None
        assert promised < 0.8 * apart


def test_of_one_group_no_error_is_known() -> None:
    one = drawn([(1, 1.0), (5, 1.0)], np.random.default_rng(0))
    assert one.standard_error("d0") is None
    assert one.standard_error() is None
    assert one.standard_error("d1") is not None
    difference = one.less(one)
    assert difference is not None
    assert difference.standard_error is None
    assert Evaluation({"d": Score(1.0, 1, 1)}).standard_error() is None
    one_book = drawn([(1, 1.0), (5, 1.0)], np.random.default_rng(0), in_group=20)
    assert one_book.standard_error("d0") is None
    assert one_book.standard_error("d1") is not None


def test_a_difference_is_one_of_pairs() -> None:
    """Two models that find the same documents hard differ by much less than the documents do."""
    hard = drawn([(50, 1.0), (50, 1.0)], np.random.default_rng(0))
    nats = {d: of.nats + 0.01 * of.n_bytes for d, of in hard.documents.items()}
    worse = Evaluation(
        {d: Score(float(nats[d].sum()), 1, score.n_bytes) for d, score in hard.domains.items()},
        documents={d: replace(of, nats=nats[d]) for d, of in hard.documents.items()},
    )
    difference, own = worse.less(hard), hard.standard_error()
    assert difference is not None
    assert difference.bits_per_byte == pytest.approx(0.01 / math.log(2))
    assert difference.standard_error == pytest.approx(0.0, abs=1e-9)
    assert own is not None
    assert own > 0.01


def test_other_documents_make_no_pairs() -> None:
    random = np.random.default_rng(0)
    one, other = drawn([(50, 1.0)], random), drawn([(50, 1.0)], random)
    assert one.less(other) is None
    assert one.less(drawn([(50, 1.0), (3, 1.0)], random)) is None
    assert one.less(Evaluation(one.domains)) is None


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
    evaluation = score(model, tokens, reporter=Told(progress=lambda _, *at: seen.append(at)))
    assert seen[-1] == (evaluation.overall.tokens, evaluation.overall.tokens)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_loss_beyond_what_a_float_can_hold_is_still_a_perplexity() -> None:
    assert math.isfinite(Score(1e6, 1, 1).perplexity)


@pytest.mark.parametrize("n_shares", [2, 3, 50])
def test_shares_add_up_to_the_whole(model: LanguageModel, tokens: TokenisedCorpus, n_shares: int) -> None:
    """As processes share it out: no row is left out, none scored twice. With 50 some have nothing to do."""
    shares = [score(model, tokens, share=(number, n_shares)) for number in range(n_shares)]
    given: list[list[float]] = []
    for share in shares:
        share.added(lambda own: given.append([*own]) or own)  # type: ignore[func-returns-value]
    sums = [math.fsum(column) for column in zip(*given, strict=True)]
    added, whole = shares[-1].added(lambda own: sums), score(model, tokens)
    for domain, expected in whole.domains.items():
        found = added.domains[domain]
        assert (found.tokens, found.n_bytes) == (expected.tokens, expected.n_bytes)
        assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert added.standard_error() is None, "no process knows what each document took"


def test_the_shares_of_routing_add_up_too() -> None:
    own = Evaluation({"d": Score(2.0, 4, 8)}, {10: 0.5}, {"d": Routing({"a": 1.5, "b": 2.5}, 0.25, 4)})
    added = own.added(lambda values: [2 * value for value in values])
    assert added == Evaluation(
        {"d": Score(4.0, 4, 8)}, {10: 0.5}, {"d": Routing({"a": 3.0, "b": 5.0}, 0.5, 8)}
    )
    assert isinstance(added.routing["d"].tokens, int)
