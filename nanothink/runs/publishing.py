"""A trained model on the Hugging Face Hub: ``nanothink checkpoints push``.

An export goes up as one commit, so the repository has all of it or nothing. Its model card says what the run
did: the data by domain and size, bits per byte, settings, licence. No text of the data is part of it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanothink.checkpoints import CheckpointPayload, read_checkpoint
from nanothink.config import Config
from nanothink.errors import DataError, NanoThinkError, StorageError, UsageError
from nanothink.models import shape_sections, training_section
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.evaluating import CheckpointEvaluation, evaluate_checkpoints
from nanothink.runs.exporting import Export, export_checkpoint
from nanothink.runs.saved_model import SavedModel
from nanothink.training.records import read_description

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PATHS = ("transformer", "tokenizer", "data_dir", "path")
"""Settings that may name a file of this machine."""


@dataclass(frozen=True)
class Pushed:
    """Result of ``push``."""

    checkpoint: Path
    repository: str
    url: str | None
    """Address of the commit; None after a dry run."""
    private: bool
    licence: str
    kind: str
    files: tuple[str, ...]
    n_bytes: int
    card: str
    notes: tuple[str, ...]


def imported_licence(checkpoint: Path) -> str | None:
    """Licence of the published model that a checkpoint was made of; None where none is known."""
    origin = read_checkpoint(checkpoint, mmap=True)["run"].get("imported")
    return origin.get("licence") if isinstance(origin, dict) else None


def push(
    checkpoint: Path,
    repository: str,
    *,
    licence: str,
    private: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    data_dir: str | None = None,
    device: str | None = None,
    reporter: Reporter = SILENT,
) -> Pushed:
    """Export a model, and upload it with a model card as one commit.

    Args:
        repository: ``OWNER/NAME``, or ``NAME`` for the owner of the token.
        licence: as the Hub calls it: ``mit``, ``apache-2.0``, ``other``, ...
        private: only the owner sees a repository that is created.
        overwrite: add a commit to a repository that is there already.
        dry_run: do all but ask the Hub.
        data_dir: text that is scored; what the model was trained on when None.

    Raises:
        UsageError: a bad name or licence, no token, or a repository that is there already.
        NanoThinkError: the Hub cannot be reached, or refuses; nothing was uploaded.
        CheckpointError: the checkpoint is missing or damaged.
    """
    _check_names(repository, licence)
    payload = read_checkpoint(checkpoint, mmap=True, reporter=reporter)
    if not dry_run:
        reporter.progress("asking the Hub", 0, 0)
        repository = _free_name(repository, overwrite=overwrite)
    scored, why_not = _scores(checkpoint, payload, data_dir, device, reporter)
    with tempfile.TemporaryDirectory(prefix="nanothink-push-") as folder:
        name = repository.rpartition("/")[2]
        about = _about(SavedModel.of(checkpoint, payload).config, payload, checkpoint, scored, why_not)
        done = export_checkpoint(
            checkpoint, Path(folder) / name, licence=licence, about=about, reporter=reporter
        )
        card = (done.folder / "README.md").read_text("utf-8")
        url = None
        if not dry_run:
            reporter.progress("uploading", 0, 0)
            url = _upload(done, repository, private=private)
    notes = (*done.notes, *([f"not scored: {why_not}"] if why_not else []))
    return Pushed(
        checkpoint, repository, url, private, licence, done.kind, done.files, done.n_bytes, card, notes
    )


# ---------------------------------------------------------------------------------------------------
# The card


def _about(
    config: Config,
    payload: CheckpointPayload,
    checkpoint: Path,
    scored: CheckpointEvaluation | None,
    why_not: str,
) -> dict[str, Any]:
    """Data, scores and settings of the run, for model_card.md."""
    scores = None
    if scored:
        found = scored.evaluation
        scores = [(name, score, found.standard_error(name)) for name, score in found.domains.items()]
        scores.append(("all", found.overall, found.standard_error()))
    return {
        "tokens": _tokens(payload, checkpoint),
        "domains": ", ".join(payload["split"].get("domains", ())) or "unknown",
        "scores": scores,
        "why_not": why_not,
        "settings": _settings(config, payload["kind"]),
    }


def _tokens(payload: CheckpointPayload, checkpoint: Path) -> list[tuple[str, int, int]] | None:
    """Tokens of each domain that were trained on and held out; None where the run's records are not there."""
    name = str(payload["run"].get("name") or checkpoint.stem)
    try:
        data = read_description(checkpoint.parent / "runs" / name).get("data")
    except (DataError, StorageError):
        return None
    if not isinstance(data, dict) or data.get("fingerprint") != payload["data_fingerprint"]:
        return None
    held_out = data.get("validation_tokens", {})
    return [(domain, n, held_out.get(domain, 0)) for domain, n in data.get("train_tokens", {}).items()]


def _settings(config: Config, kind: str) -> dict[str, dict[str, str]]:
    """Settings of the model and of its training as TOML, without those that may name a file."""
    values = config.model_dump(mode="json")
    return {
        section: {
            name: json.dumps(value)
            for name, value in values[section].items()
            if value is not None and name not in _PATHS and not isinstance(value, Mapping)
        }
        for section in ("model", *shape_sections(kind), training_section(kind))
    }


def _scores(
    checkpoint: Path,
    payload: CheckpointPayload,
    data_dir: str | None,
    device: str | None,
    reporter: Reporter,
) -> tuple[CheckpointEvaluation | None, str]:
    """The model's scores as it is exported, or why there are none."""
    if data_dir is None and not payload["data_fingerprint"]:
        return None, "it was not trained here"
    try:
        (found,) = evaluate_checkpoints(
            [checkpoint], data_dir=data_dir, device=device, vector_store=False, reporter=reporter
        )
    except (DataError, UsageError, StorageError) as error:
        if data_dir is not None:
            raise
        return None, str(error).partition("\n")[0]
    return found, ""


# ---------------------------------------------------------------------------------------------------
# The Hub


def _check_names(repository: str, licence: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"'{repository}' is no name of a repository: {error} Use OWNER/NAME.") from None
    if not _LICENCE.fullmatch(licence):
        raise UsageError(
            f"--license {licence!r}: use the Hub's name of a licence, such as mit, apache-2.0, cc-by-4.0 or "
            "other."
        )


def _free_name(repository: str, *, overwrite: bool) -> str:
    """The full name of a repository that can be written to."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UsageError(
            "There is no token of the Hugging Face Hub on this machine. Log in: hf auth login. Or set "
            "HF_TOKEN to a token that may write."
        )
    api = huggingface_hub.HfApi()
    with _refusals_explained(repository):
        owner = api.whoami()["name"]
        if "/" not in repository:
            repository = f"{owner}/{repository}"
        taken = api.repo_exists(repository)
    if taken and not overwrite:
        raise UsageError(
            f"The Hub has a repository {repository} already. Name another. Or add this model to it as a "
            "commit: --overwrite"
        )
    return repository


def _upload(done: Export, repository: str, *, private: bool) -> str:
    import huggingface_hub

    from nanothink.data.hub import no_progress_bars

    api = huggingface_hub.HfApi()
    with _refusals_explained(repository), no_progress_bars():
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=done.folder, commit_message=f"{done.kind} by NanoThink"
        )
    return str(commit.commit_url)


@contextmanager
def _refusals_explained(repository: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = (getattr(error, "server_message", None) or str(error)).strip().partition("\n")[0]
        if status in (401, 403):
            raise UsageError(
                f"The Hub refuses this token for {repository} ({said}). It needs the right to write there: "
                "hf auth login."
            ) from error
        raise NanoThinkError(f"The Hub did not take {repository}: {said}") from error
    except NanoThinkError:
        raise
    except Exception as error:  # the network library raises many kinds
        cause = error.__cause__ or error  # "Error while uploading" says nothing
        reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
        raise NanoThinkError(f"The Hub cannot be reached, and nothing was uploaded: {reason}") from error
