"""A training plan where it meets the disk: text measured, settings written, the plan kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanothink.checkpoints import read_checkpoint
from nanothink.data.corpus import bad_records_error, find_corpus
from nanothink.data.importing import document_texts
from nanothink.data.problems import Problems
from nanothink.data.records import iter_records
from nanothink.data.sources import has_documents
from nanothink.data.tokenizer import load_tokenizer
from nanothink.disk import make_folder, storage_error, write_whole
from nanothink.errors import CheckpointError, DataError, NanoThinkError, UsageError
from nanothink.models.joint_gate import GATE_PREFIX
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.plan_sizes import Shape, TextSize
from nanothink.runs.training_plan import TrainingPlan

PLAN_FILE, SETTINGS_FILE, TOKENIZER_FOLDER = "plan.json", "train.toml", "tokenizer"
IMPORTED_FOLDER = "data"
_PROMPT_CHARS = 30
_COUNTED_CHARS = 500_000
_NEVER = 1_000_000  # a plan keeps the best model and the latest state, and goes to the end of its schedules


def is_imported(data_dir: Path, checkpoint_dir: Path) -> bool:
    """True for documents, and for a folder of them that is no corpus."""
    try:
        find_corpus(data_dir)
    except DataError:
        return has_documents(data_dir, checkpoint_dir / IMPORTED_FOLDER)
    return False


def measure_text(data_dir: Path, checkpoint_dir: Path, reporter: Reporter = SILENT) -> TextSize:
    """Read a corpus, or the documents that would be imported.

    Raises:
        DataError: there is none, or it has bad lines.
    """
    digest, n_bytes = hashlib.blake2b(digest_size=16), 0
    if is_imported(data_dir, checkpoint_dir):
        for text in document_texts(data_dir, checkpoint_dir / IMPORTED_FOLDER, reporter):
            content = text.encode()
            digest.update(content + b"\0")
            n_bytes += len(content)
        return TextSize(n_bytes=n_bytes, n_domains=1, digest=digest.hexdigest())
    corpus, problems = find_corpus(data_dir), Problems()
    advance = reporter.counter("reading", corpus.n_bytes)
    for domain, path in corpus.files:
        digest.update(f"{domain}/{path.name}\0".encode())
        for _, record in iter_records(path, on_problem=problems.add, on_bytes=advance, digest=digest):
            n_bytes += len(record.text.encode())
    if problems:
        raise bad_records_error(corpus.root, problems)
    return TextSize(n_bytes=n_bytes, n_domains=len(corpus.domains), digest=digest.hexdigest())


def opening(data_dir: Path, checkpoint_dir: Path) -> str:
    """The first words of the first text, as a prompt."""
    if is_imported(data_dir, checkpoint_dir):
        return _first_words(next(document_texts(data_dir, checkpoint_dir / IMPORTED_FOLDER), ""))
    for _, path in find_corpus(data_dir).files:
        for _, record in iter_records(path, on_problem=lambda _: None):
            return _first_words(record.text)
    return "The"


def _first_words(text: str) -> str:
    words = [word for word in text[:1000].split() if any(map(str.isalpha, word))]
    return " ".join(words[:2])[:_PROMPT_CHARS] or "The"


def with_tokens_counted(plan: TrainingPlan, checkpoint_dir: Path) -> TrainingPlan:
    """The plan by the trained tokenizer's own tokens, of the first texts of each file.

    As it is where text or tokenizer cannot be read, which the command that uses them says.
    """
    try:
        files = list(find_corpus(str(settings_of(plan, checkpoint_dir)["data.data_dir"])).files)
        tokenizer = load_tokenizer(str(checkpoint_dir / TOKENIZER_FOLDER))
    except NanoThinkError:
        return plan
    n_bytes = n_tokens = 0
    for n_files, (_, path) in enumerate(files, 1):
        for _, record in iter_records(path, on_problem=lambda _: None):
            text = record.text[:_COUNTED_CHARS]
            n_bytes += len(text.encode())
            n_tokens += len(tokenizer.encode(text))
            if n_bytes > _COUNTED_CHARS * n_files / len(files):
                break
    text_size = plan.text.model_copy(update={"bytes_per_token": n_bytes / n_tokens})
    return plan.model_copy(update={"text": text_size})


def have_gates(checkpoints: Iterable[Path]) -> bool:
    """True if all models have a joint gate, and so can use a document cache."""
    try:
        states = [read_checkpoint(path, mmap=True)["model_state"] for path in checkpoints]
    except CheckpointError:  # which the command that uses them names
        return False
    return all(any(name.startswith(GATE_PREFIX) for name in state) for state in states)


def settings_of(plan: TrainingPlan, checkpoint_dir: Path) -> dict[str, Any]:
    """The settings that all commands of a plan share, by ``section.key``."""
    imports = any(stage.name == "import" for stage in plan.stages)
    return {
        "data.data_dir": str(checkpoint_dir / IMPORTED_FOLDER) if imports else plan.data_dir,
        "data.tokenizer": str(checkpoint_dir / TOKENIZER_FOLDER),
        **shape_settings(plan.shape),
        "vector_store.enabled": True,
        "train_mla.fit": "gate",
    }


def shape_settings(shape: Shape) -> dict[str, Any]:
    """Settings of the models and their batches."""
    trained = {
        f"{section}.{name}": value
        for section in ("train_expert", "train_diffuser", "train_mla")
        for name, value in (
            ("batch_size", shape.batch_size),
            ("grad_accum_steps", 1),
            ("warmup_steps", 50),
            ("snapshot_every_epochs", _NEVER),
            ("early_stopping_patience", _NEVER),
        )
    }
    return {
        "model.d_model": shape.d_model,
        "model.max_seq_len": shape.length,
        "transformer.n_heads": shape.n_heads,
        "mla.n_heads": shape.n_heads,
        **{f"{kind}.n_layers": n for kind, n in shape.layers.items()},
        **trained,
    }


class PlanFile:
    """The plan of a checkpoint folder."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self.path = checkpoint_dir / PLAN_FILE

    def read(self) -> TrainingPlan | None:
        """The plan, or None if there is none.

        Raises:
            UsageError: the file is no plan.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"The plan {self.path} cannot be read: {error.strerror}.") from None
        try:
            return TrainingPlan.model_validate_json(content)
        except ValidationError:
            raise UsageError(
                f"{self.path} is damaged, or no plan of this version. Remove it to plan anew; to train from "
                "the beginning, --overwrite."
            ) from None

    def write(self, plan: TrainingPlan) -> None:
        """Write the plan, whole or not at all. Raises StorageError."""
        try:
            make_folder(self.path.parent)
        except OSError as error:
            raise storage_error(self.path, error, replaced=False) from None
        write_whole(self.path, plan.model_dump_json(indent=2).encode() + b"\n")


def write_settings(checkpoint_dir: Path, settings: dict[str, Any]) -> Path:
    """Write settings as a TOML file. Raises StorageError."""
    sections: dict[str, list[str]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, []).append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    lines = [line for section, own in sections.items() for line in (f"[{section}]", *own, "")]
    path = checkpoint_dir / SETTINGS_FILE
    write_whole(path, "\n".join(lines).encode())
    return path
