"""The frozen transformer that a diffuser learns from: found, checked, opened."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanothink.checkpoints import CheckpointPayload, read_checkpoint, restore_model
from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.data.tokenizer import Tokenizer
from nanothink.errors import CheckpointError, CheckpointMismatchError, CheckpointNotFoundError
from nanothink.models.transformer import Transformer
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.rebuilding import rebuild

DEFAULT_NAME = "transformer_expert.pt"


@dataclass(frozen=True)
class FrozenTransformer:
    """A trained transformer that fits. Its weights stay on the disk until ``build``."""

    path: Path
    payload: CheckpointPayload
    config: Config
    tokenizer: Tokenizer
    tokenizer_setting: str
    """What ``data.tokenizer`` was when it was trained."""
    digest: str
    """Of its weights: a diffuser whose targets it computes goes on with just these."""

    def build(self, reporter: Reporter = SILENT) -> Transformer:
        """Build the model in evaluation mode, without gradients, on the CPU; note weights that do not fit."""
        vocab_size = self.tokenizer.vocab_size
        model = rebuild("transformer", self.config, vocab_size, payload=self.payload, path=self.path)
        assert isinstance(model, Transformer)
        report = restore_model(model, self.payload, expect_kind="transformer", path=self.path)
        for line in report.lines():
            reporter.note(f"{self.path}: {line}")
        return model.eval().requires_grad_(False)


def find_transformer(config: Config, checkpoint_dir: Path, reporter: Reporter = SILENT) -> FrozenTransformer:
    """Open the transformer that the settings name, or the one in the checkpoint folder.

    Args:
        config: the diffuser's settings.
        checkpoint_dir: where ``transformer_expert.pt`` is looked for when none is named.

    Raises:
        CheckpointError: it is missing, no transformer, or of another width or context; with what to run.
    """
    named = config.diffuser.transformer
    path = Path(named) if named is not None else checkpoint_dir / DEFAULT_NAME
    if not path.exists():
        raise CheckpointNotFoundError(
            f"A diffuser learns from a trained transformer, and {path} is not there. Train one first: "
            f"nanothink pretrain transformer --set model.d_model={config.model.d_model} --checkpoint-dir "
            f"{checkpoint_dir}. Or name one: --transformer PATH."
        )
    payload = read_checkpoint(path, mmap=True, reporter=reporter)
    if payload["kind"] != "transformer":
        raise CheckpointMismatchError(
            f"{path} holds a {payload['kind']}, and a diffuser learns from a transformer. Name one: "
            "--transformer PATH. Or train one: nanothink pretrain transformer"
        )
    own = resolve_config(base=payload["config"]).config
    if own.model.d_model != config.model.d_model:
        raise CheckpointMismatchError(
            f"{path} has width {own.model.d_model}, and this one would have {config.model.d_model}. Give "
            f"it the same: nanothink pretrain diffuser --set model.d_model={own.model.d_model}. Or train "
            f"another transformer: nanothink pretrain transformer --set model.d_model={config.model.d_model} "
            "--name OTHER"
        )
    if config.diffuser.target == "hidden_state" and own.model.max_seq_len < config.model.max_seq_len:
        raise CheckpointMismatchError(
            f"{path} has a context of {own.model.max_seq_len} tokens, and this diffuser's targets would be "
            f"its states over {config.model.max_seq_len}. Use a shorter one: nanothink pretrain diffuser "
            f"--set model.max_seq_len={own.model.max_seq_len}"
        )
    return FrozenTransformer(
        path=path,
        payload=payload,
        config=own,
        tokenizer=Tokenizer.from_state(payload["tokenizer"]),
        tokenizer_setting=own.data.tokenizer,
        digest=weights_digest(payload["model_state"]),
    )


def check_same_transformer(frozen: FrozenTransformer, run: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on from ``path`` with another transformer than its run began with."""
    if run.get("transformer") != frozen.digest:
        raise CheckpointError(
            f"{path} was trained against another transformer than {frozen.path}, and its targets are that "
            "one's hidden states. Put the old one back, or name it: --set diffuser.transformer=PATH"
        )


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Tells two models apart by their weights, which lie on the CPU."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
