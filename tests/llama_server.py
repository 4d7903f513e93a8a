"""llama.cpp as tests ask it: a GGUF file behind its own server, in this process (the package xllamacpp)."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class LlamaCpp:
    """A model in llama.cpp, asked through its own server."""

    def __init__(self, address: str) -> None:
        self._address = address

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, no special token among them."""
        found: list[int] = self._ask("tokenize", {"content": text, "parse_special": False})["tokens"]
        return found

    def log_probabilities(self, tokens: Sequence[int], vocab_size: int) -> np.ndarray:
        """(V,) of the token after these, in nats."""
        request = {
            "prompt": list(tokens),
            "n_predict": 1,
            "n_probs": vocab_size,
            "temperature": 1.0,
            "cache_prompt": False,
            # What is drawn does not count, but half a character or EOS would come without probabilities.
            "logit_bias": [[self.tokenize("a")[0], 1000.0]],
        }
        (first,) = self._ask("completion", request)["completion_probabilities"]
        found = np.full(vocab_size, -np.inf)
        for entry in first["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def _ask(self, what: str, request: dict[str, Any]) -> Any:
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self._address}/{what}", body, headers)
        ) as answer:
            return json.load(answer)


@contextmanager
def llama_cpp(path: Path, context: int = 64) -> Iterator[LlamaCpp]:
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = context, 1, False
    parameters.cpuparams.n_threads = parameters.n_threads_http = 1
    parameters.verbosity = -1
    # As in our model: keys and values in float32, and no kernel that halves them.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    yield LlamaCpp(server.listening_address)
    del server


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Kullback-Leibler divergence in nats."""
    return float((np.exp(expected) * (expected - found)).sum())


def texts(n: int = 300) -> list[str]:
    """Texts of letters, digits, signs, CJK, emoji and odd white space, as they come."""
    words = "time, light,stone,水の中,日本語,한국어,🌊,👩\u200d👧,é,e\u0301,ß,Ω,١٢٣,123,ﬁ,½,don't,'s,'LL"
    signs = "_ # < |> <|endoftext|> x=1; . , !?"
    spaces = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\u00a0", "\u200b", "\u0085", "\u2028"]
    pieces = [*words.split(","), *signs.split(" "), *spaces]
    drawn = random.Random(0)
    return ["".join(drawn.choices(pieces, k=drawn.randint(1, 24))) for _ in range(n)]
