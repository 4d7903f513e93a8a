"""What a model predicts after a text, whom it trusts there, and the training text that it recalls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from nanothink.inference.generate import evaluating, window_start
from nanothink.inference.scores import token_scores
from nanothink.models.decoding_states import JointState
from nanothink.models.nanothink import NanoThink
from nanothink.runs.store_commands import nearest_passages
from nanothink.runs.trained_model import TrainedModel
from nanothink.vector_store.contents import VectorStore


def inspect(
    loaded: TrainedModel, tokens: Sequence[int], *, n_likeliest: int, n_passages: int
) -> dict[str, Any]:
    """The prediction after ``tokens``, as a JSON object.

    Returns:
        ``likeliest``: tokens with text and probability. ``weights``: of a combined model's components.
        ``passages``: the nearest keys of its vector store, with what stands before them, file and line.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    text = list(tokens) or [tokenizer.eos_id]
    window = text[window_start(len(text), model.context_length) :]
    with evaluating(model), torch.inference_mode():
        state = model.start(1)
        logits = model.step(torch.tensor([window], device=loaded.device), state)
    (score,) = token_scores(logits, [int(logits.argmax())], n_likeliest)
    found: dict[str, Any] = {
        "likeliest": [
            {"token": token, "text": tokenizer.decode([token]), "probability": math.exp(value)}
            for token, value in score.likeliest
        ],
        "weights": {},
        "passages": [],
    }
    if isinstance(model, NanoThink) and isinstance(state, JointState):
        assert state.weights is not None
        found["weights"] = dict(zip(model.components, state.weights[0].tolist(), strict=True))
        if isinstance(model.vector_store, VectorStore) and model.store_gate is not None and n_passages:
            assert state.query is not None
            temperature = float(model.store_gate.log_temperature.exp())
            hits = nearest_passages(
                model.vector_store, tokenizer, state.query.cpu().numpy(), temperature, n_passages
            )
            found["passages"] = [asdict(hit) for hit in hits]
    return found
