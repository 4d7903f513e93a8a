"""A trained model as a Python object."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from nanothink.checkpoints.export import is_export
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.config import Config
from nanothink.data.chat import ChatEncoder
from nanothink.data.split import TrainedText, text_key
from nanothink.data.tokenizer import Tokenizer
from nanothink.errors import UsageError
from nanothink.inference.denoising import Reconstruction, measured_levels, reconstruct
from nanothink.inference.generate import StreamDecoder, generate
from nanothink.inference.routed import RoutedPiece, generate_routed
from nanothink.inference.sampling import SamplingConfig, sampling_config
from nanothink.inference.stopping import generate_until
from nanothink.models import training_of
from nanothink.models.contract import LanguageModel, State
from nanothink.models.decoding import int8
from nanothink.models.decoding.large_pages import lay_together
from nanothink.models.decoding_states import Ddim
from nanothink.models.diffuser import Diffuser
from nanothink.models.document_cache import CachedModel
from nanothink.models.nanothink import NanoThink
from nanothink.models.precision import Precision, choose_device
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.saved_model import SavedModel
from nanothink.runs.vector_store import open_beside
from nanothink.suggestions import suggest
from nanothink.vector_store.contents import VectorStore


@dataclass(frozen=True)
class TrainedModel:
    """A model from a checkpoint, ready for use. It needs no other file, except those of its vector store."""

    path: Path
    model: LanguageModel
    config: Config
    tokenizer: Tokenizer
    device: torch.device
    split: SplitRecord
    """The rule of its split, and the documents that it was trained on; see ``trained_on``."""
    notes: tuple[str, ...]
    """Weights that did not fit, a line for each kind; empty if all fitted."""
    document_cache: bool = False
    """Whether predictions use a document cache (models/document_cache.py)."""
    gate_documents: tuple[int, ...] = ()
    """Keys of the held-out documents that its joint gate was fitted on."""

    @classmethod
    def of(
        cls,
        saved: SavedModel,
        *,
        device: str | None = None,
        vector_store: bool = True,
        document_cache: bool = False,
        quantize: Literal["int8"] | None = None,
        reporter: Reporter = SILENT,
    ) -> TrainedModel:
        """The model of a checkpoint that has been read; arguments and errors as for ``load``."""
        chosen = choose_device(device)
        model, notes = saved.build(chosen)
        if quantize is not None:
            model.float()
        if chosen.type == "cpu":
            lay_together(model)
        if quantize is not None:
            int8.round_weights(model)
        model.to(chosen)
        config = saved.runnable_config(chosen)
        if vector_store and isinstance(model, NanoThink) and model.store_gate is not None:
            model.vector_store = open_beside(saved, reporter)
        if model.joint_gate is not None:
            model.joint_gate = model.joint_gate.to(chosen)
        elif document_cache:
            raise UsageError(
                f"{saved.path} has no gate for a document cache: a cache made its held-out text no likelier, "
                "or its run was not complete. Use it without --document-cache."
            )
        gate_documents = tuple(saved.payload["run"].get("gate_documents", ()))
        trained = (saved.path, model, config, saved.tokenizer, chosen, saved.split, notes)
        return cls(*trained, document_cache, gate_documents)

    @property
    def kind(self) -> str:
        return self.model.kind

    @cached_property
    def decoder(self) -> LanguageModel:
        """What continues texts: the model, or the model with a document cache."""
        if not self.document_cache:
            return self.model
        cache = self.config.document_cache
        bounds = {"window": cache.window_tokens, "n_neighbours": cache.n_neighbours}
        return cast(LanguageModel, CachedModel(self.model, eos_id=self.tokenizer.eos_id, **bounds))

    @property
    def uses_gate(self) -> bool:
        """Whether predictions go through the joint gate, and so are no fair ones of ``gate_documents``."""
        model = self.model
        stored = isinstance(model, NanoThink) and model.vector_store is not None and model.gates_store
        return model.joint_gate is not None and (stored or self.document_cache)

    @cached_property
    def precision(self) -> Precision:
        """Device and type for evaluation: the type of training, unless this machine is slower in it.

        ``logits`` and ``generate`` compute in float32.
        """
        from nanothink.training.matmul_types import precision_of_use

        return precision_of_use(training_of(self.kind, self.config), self.config.model, self.device)

    @cached_property
    def trained_text(self) -> TrainedText:
        """The documents that any part of the model was trained on, and those in its vector store."""
        return reduce(operator.or_, self.seen_by().values())

    def trained_on(self, text: str) -> bool:
        """True if this text is a document that a part of the model was trained on, or that its store holds.

        White space, line ends and Unicode normalisation make no difference. A text of which only the head was
        trained on counts as trained on.
        """
        return bool(self.trained_text.holds(np.array([text_key(text)], np.uint64))[0])

    def seen_by(self) -> dict[str, TrainedText]:
        """``trained_text`` of the model and of its vector store, by name."""
        seen = {str(self.path): self.split.trained}
        if isinstance(self.model, NanoThink) and self.model.vector_store is not None:
            assert isinstance(self.model.vector_store, VectorStore)
            seen[f"the vector store of {self.path}"] = self.model.vector_store.trained_text
        return seen

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token logits: (B, T) int64 -> (B, T, V) float32, on the device of ``tokens``.

        With a document cache each row is the beginning of a text.
        """
        self._check_tokens(tokens)
        with torch.inference_mode():
            return self.decoder.logits(tokens.to(self.device)).to(tokens.device)

    def routing(self, tokens: torch.Tensor) -> torch.Tensor:
        """Weight of each expert of a combined model: (B, T) int64 -> (B, T, E) float32, in rows of sum 1.

        The weights at position t are those of the prediction of token t + 1. ``.model.names`` has the names
        of the experts in their order. A vector store adds a column with its share of the prediction;
        ``.model.components`` names all columns.

        Raises:
            UsageError: this model combines no experts, or the tokens are not its own.
        """
        model = self._combined()
        self._check_tokens(tokens)
        with torch.inference_mode():
            return model.routing(tokens.to(self.device)).to(tokens.device)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        on_text: Callable[[int, str], None] | None = None,
        ddim_steps: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Any:
        """Continue a prompt, or each of several.

        Args:
            prompt: one string, or a sequence of them, continued side by side.
            on_text: called with (row, piece of text) as text becomes final.
            ddim_steps: for a diffuser: denoise each token by DDIM in this many evaluations, from drawn noise;
                0 for its ``diffuser.inference_steps``. Randomness then comes from the noise, and the
                temperature is 0 unless it is given. None: tokens are drawn from the head's distribution at
                the null noise, the one that loss and perplexity measure.
            stop: strings; a text ends where the first of them begins.
            sampling: fields of ``SamplingConfig``: temperature, top_k, top_p, max_new_tokens, seed ...

        Returns:
            The continuation without the prompt: a string for a string, else a list of strings.
        """
        prompts = [self.tokenizer.encode_prompt(p) for p in ([prompt] if isinstance(prompt, str) else prompt)]
        if stop:
            model, config, start = self._decoding(ddim_steps, sampling)
            texts = generate_until(
                model,
                prompts,
                config,
                stop,
                tokenizer=self.tokenizer,
                eos_id=self.tokenizer.eos_id,
                on_text=on_text or (lambda row, piece: None),
                start=start,
            )
            return texts[0] if isinstance(prompt, str) else texts
        decoders = [StreamDecoder(self.tokenizer) for _ in prompts]

        def on_token(row: int, token: int) -> None:
            if on_text is not None and (piece := decoders[row].push(token)):
                on_text(row, piece)

        new = self.continue_tokens(prompts, on_token=on_token, ddim_steps=ddim_steps, **sampling)
        if on_text is not None:
            for row, decoder in enumerate(decoders):
                if piece := decoder.flush():
                    on_text(row, piece)
        texts = [self.tokenizer.decode(tokens) for tokens in new]
        return texts[0] if isinstance(prompt, str) else texts

    def continue_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        on_token: Callable[[int, int], None] | None = None,
        ddim_steps: int | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """``generate`` on token ids; returns the new ones of each prompt.

        ``on_token`` is called with (row, token).
        """
        model, config, start = self._decoding(ddim_steps, sampling)
        eos_id = self.tokenizer.eos_id
        return generate(model, prompts, config, eos_id=eos_id, on_token=on_token, start=start)

    @cached_property
    def chat(self) -> ChatEncoder:
        """Conversations as tokens, by the model's chat template.

        Raises:
            UsageError: it has none.
        """
        if self.tokenizer.chat is None:
            raise UsageError(
                f"{self.path} has no chat template: it continues texts, and was not trained to answer. "
                f"Import an instruct model ({suggest('checkpoints import --help')}), or train on "
                "conversations: records with `messages` (docs/data.md)."
            )
        return ChatEncoder(self.tokenizer)

    def answer(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        *,
        on_text: Callable[[int, str], None] | None = None,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> list[str]:
        """Write the next message of each of several conversations.

        Args:
            conversations: messages with ``role`` ("system", "user" or "assistant") and ``content``.
            on_text: called with (row, piece of text) as text becomes final.
            stop, sampling: as of ``generate``.

        Raises:
            UsageError: the model has no chat template.
            ChatTemplateError: it does not take these messages.
        """
        return generate_until(
            self.decoder,
            [self.chat.prompt(messages) for messages in conversations],
            sampling_config(**sampling),
            stop,
            tokenizer=self.tokenizer,
            eos_id=self.tokenizer.eos_id,
            on_text=on_text or (lambda row, piece: None),
            end_ids=self.chat.end_ids,
        )

    def generate_routed(
        self, prompt: str, *, on_piece: Callable[[RoutedPiece], None] | None = None, **sampling: Any
    ) -> list[RoutedPiece]:
        """``generate`` with a combined model: each token with the weights of its prediction.

        Args:
            prompt: text to continue.
            on_piece: called with each piece as soon as it is drawn.
            sampling: as of ``generate``.

        Raises:
            UsageError: this model combines no experts.
        """
        self._combined()
        return generate_routed(
            cast(NanoThink | CachedModel, self.decoder),
            self.tokenizer.encode_prompt(prompt),
            sampling_config(**sampling),
            tokenizer=self.tokenizer,
            eos_id=self.tokenizer.eos_id,
            on_piece=on_piece,
        )

    def denoise(
        self, passage: str, levels: Sequence[int] | None = None, *, seed: int = 0, ddim_steps: int = 1
    ) -> list[Reconstruction]:
        """For a diffuser: add noise to every token of a passage and let the model reconstruct it.

        Args:
            passage: at most a context of text.
            levels: noise levels, 1 to ``diffuser.training_steps``; a spread of them when left out.
            seed: of the noise.
            ddim_steps: evaluations on the way down from each level; 0 for ``diffuser.inference_steps``.

        Raises:
            UsageError: not a diffuser, or a passage or level that it cannot take.
            TextLostError: the tokenizer does not give the passage back.
        """
        model = self._diffuser()
        levels = measured_levels(model.shape.training_steps) if levels is None else levels
        n_steps = ddim_steps or model.shape.inference_steps
        return reconstruct(model, self.tokenizer.encode_exactly(passage), levels, seed=seed, n_steps=n_steps)

    def _decoding(
        self, ddim_steps: int | None, sampling: Mapping[str, Any]
    ) -> tuple[LanguageModel, SamplingConfig, Any]:
        """Model, settings and start of decoding: None, or a diffuser's by DDIM."""
        if ddim_steps is None:
            return self.decoder, sampling_config(**sampling), None
        model = self._diffuser()
        n_steps = ddim_steps or model.shape.inference_steps
        model.start(1, Ddim(n_steps, (0,)))  # a number out of bounds is said before anything is computed

        def start(seeds: Sequence[int]) -> State:
            return model.start(len(seeds), Ddim(n_steps, tuple(seeds)))

        return model, sampling_config(**{"temperature": 0.0, **sampling}), start

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        if tokens.ndim != 2 or not tokens.numel():
            raise UsageError(f"tokens must be (B, T) with at least one token, got {tuple(tokens.shape)}.")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.model.vocab_size:
            raise UsageError(
                f"token ids must lie in 0 to {self.model.vocab_size - 1}, got {low} to {high}. Tokens of "
                "another tokenizer? This model's own is .tokenizer."
            )

    def _combined(self) -> NanoThink:
        if not isinstance(self.model, NanoThink):
            raise UsageError(
                f"{self.path} holds a {self.kind}, and only a model that combines experts routes between "
                f"them: {suggest('train-mla')} makes one."
            )
        return self.model

    def _diffuser(self) -> Diffuser:
        if not isinstance(self.model, Diffuser):
            raise UsageError(f"{self.path} holds a {self.kind}; only a diffuser can denoise.")
        return self.model


def load(
    path: str | Path,
    *,
    device: str | None = None,
    vector_store: bool = True,
    document_cache: bool = False,
    quantize: Literal["int8"] | None = None,
    reporter: Reporter = SILENT,
) -> TrainedModel:
    """Open a checkpoint, or a folder that ``checkpoints export`` wrote, for use.

    Args:
        device: "cpu", "cuda", "mps" ...; the best one there is when None.
        vector_store: open the vector store beside the checkpoint too, if it was trained with one.
        document_cache: mix predictions with what followed similar states in the text read so far.
        quantize: "int8" rounds the matrices to eight bits a number: faster steps on a CPU, slightly other
            predictions.

    Raises:
        CheckpointError: it is missing, damaged, or holds something else; an export's weights are not those of
            its model.
        VectorStoreError: the vector store is missing, damaged, or another model's.
    """
    path = Path(path)
    saved = SavedModel.read_export(path) if is_export(path) else SavedModel.read(path, reporter)
    return TrainedModel.of(
        saved,
        device=device,
        vector_store=vector_store,
        document_cache=document_cache,
        quantize=quantize,
        reporter=reporter,
    )
