"""Callbacks of the training loop: validate, write samples, save."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

import numpy as np

from nanothink.checkpoints import CheckpointStore, Role
from nanothink.data.tokens import IGNORE, TokenStream
from nanothink.errors import DataError
from nanothink.inference.calibration import fit_logit_scale
from nanothink.inference.evaluate import Evaluation, EvaluationStopped
from nanothink.inference.generate import generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models.nanothink import NanoThink
from nanothink.reporter import Reporter
from nanothink.runs.building import weights_checksum
from nanothink.runs.preparing import RunSetup
from nanothink.runs.saving import save_state
from nanothink.runs.scoring import score
from nanothink.suggestions import command
from nanothink.training.interruption import StopRequest
from nanothink.training.loop import Callbacks, Run
from nanothink.training.objectives import ExpertObjective

_SAMPLED_DOMAINS = 3
_QUESTION_TOKENS = 512
_SAMPLING = "writing samples"
_OPENING_TOKENS = 6  # of a held-out text, as a prompt: a few words


def make_callbacks(
    setup: RunSetup, run: Run, store: CheckpointStore, reporter: Reporter, stop: StopRequest
) -> Callbacks:
    """The callbacks of a run. Raises DataError when there is nothing to validate on."""
    train_config, processes = setup.training, run.processes
    if not any(stream.n_tokens for stream in setup.tokens.val.values()):
        raise DataError("There is no validation text: every domain needs at least two characters of text.")
    sampling = SamplingConfig(max_new_tokens=max(1, train_config.sample_tokens), seed=train_config.seed)

    def stopped() -> bool:
        """Ask all processes, which compute in step."""
        return processes.any(stop())

    def calibrate() -> float:
        if isinstance(run.model, NanoThink) and run.model.store_gate is not None:
            return 1.0  # its predictions are no softmax of scaled logits
        return fit_logit_scale(
            run.model,
            {name: stream.sample(train_config.eval_max_tokens) for name, stream in setup.tokens.val.items()},
            length=setup.config.model.max_seq_len,
            precision=run.precision,
            should_stop=stopped,
            reporter=reporter,
        )

    def evaluate_share() -> Evaluation:
        return score(
            run.model,
            setup.tokens.val,
            length=setup.config.model.max_seq_len,
            precision=run.precision,
            max_tokens=train_config.eval_max_tokens,
            base=run.objective.base if isinstance(run.objective, ExpertObjective) else None,
            reporter=reporter,
            stage="validating",
            should_stop=stopped,
            share=(processes.rank, processes.size),
        )

    def evaluate() -> Evaluation:
        if processes.size > 1:
            processes.assert_same_on_all_ranks(
                f"weights after step {run.state.step}", weights_checksum(run.placement.shared())
            )
        with run.placement.in_step():
            own_scale = calibrate()
            run.model.logit_scale = processes.all_reduce_sum([own_scale if processes.is_rank0 else 0.0])[0]
            return evaluate_share().added(processes.all_reduce_sum)

    def sample() -> Mapping[str, str]:
        prompts = _sample_prompts(setup)
        tokenizer = setup.tokenizer
        written = [0] * len(prompts)

        def tell_or_leave(row: int, token: int) -> None:
            if stopped():
                raise EvaluationStopped
            written[row] += 1  # the rows advance together
            reporter.progress(_SAMPLING, max(written) - 1, sampling.max_new_tokens)

        with run.placement.in_step():
            continued = generate(
                run.model,
                list(prompts.values()),
                sampling,
                eos_id=tokenizer.eos_id,
                on_token=tell_or_leave,
            )
        reporter.progress(_SAMPLING, 1, 1)
        return {prompt: tokenizer.decode(new) for prompt, new in zip(prompts, continued, strict=True)}

    def save(role: Role) -> Path:
        return save_state(setup, run, store, role)

    def resume_command(*words: str) -> str:
        origin = setup.resume_point
        path = next(reversed(store.rolling()), store.interrupted if origin is None else origin.path)
        asked = setup.spec.device if processes.size == 1 else None  # else each process has its own
        device = ["--device", asked] if asked else []
        return " ".join([*map(shlex.quote, processes.launcher), command("resume", path, *device, *words)])

    return Callbacks(evaluate, sample, save, reporter=reporter, stop=stop, resume_command=resume_command)


def _sample_prompts(setup: RunSetup) -> dict[str, list[int]]:
    """The prompts of the settings, else the first words of a held-out text of each domain, by their text.

    Of a conversation it is all that stands before the first answer.
    """
    tokenizer = setup.tokenizer
    if setup.training.sample_prompts is not None:
        return {prompt: tokenizer.encode_prompt(prompt) for prompt in setup.training.sample_prompts}
    openings = {}
    for stream in list(setup.tokens.val.values())[:_SAMPLED_DOMAINS]:
        if (asked := _first_question(stream)) not in (None, [tokenizer.bos_id]):
            assert asked is not None
            openings[tokenizer.decode(asked)] = asked
            continue
        tokens = stream.block(0, 1 + _OPENING_TOKENS)[0][1:].tolist()  # what stands first is an EOS
        first_text = takewhile(lambda token: token != tokenizer.eos_id, tokens)
        words = [token for token in first_text if token != tokenizer.bos_id]
        opening = tokenizer.decode(words).rstrip("\N{REPLACEMENT CHARACTER}")
        openings[opening] = tokenizer.encode_prompt(opening)
    return openings


def _first_question(stream: TokenStream) -> list[int] | None:
    """Tokens before the first answer of a stream that begins with a conversation; None of another."""
    if not stream.n_tokens:
        return None
    inputs, targets = stream.block(0, _QUESTION_TOKENS)
    answers = np.flatnonzero(targets != IGNORE)
    if not len(answers) or not answers[0]:
        return None
    return [int(token) for token in inputs[1 : answers[0] + 1]]
