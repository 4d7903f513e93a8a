"""Writing of token files: texts and conversations to tokens, in chunks that bound the memory."""

from __future__ import annotations

import contextlib
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from nanothink.data.chat import ChatEncoder
from nanothink.data.chat_process import ChatTemplateError
from nanothink.data.encoding import TextLostError, Tokenizer
from nanothink.data.lines import shown
from nanothink.data.messages import Message, answer_bytes
from nanothink.data.pages import PageWriter
from nanothink.data.problems import Problems
from nanothink.data.split import text_key
from nanothink.data.token_files import DOCUMENT, FORMAT, MAGIC, TRAILER, bad_lines_of, token_dtype
from nanothink.disk import storage_error, whole_file

_CHUNK_CHARS = 1 << 20
_CHUNK_DOCUMENTS = 1 << 14
_ROWS_IN_MEMORY_BYTES = 1 << 20


class _Document(NamedTuple):
    line: int
    text: str
    group: int
    messages: Sequence[Message]


class TrainedBits:
    """Writer of a bit per token to a temporary file.

    Args:
        n_before: tokens before the first that is appended, all of which are trained on.
    """

    def __init__(self, folder: Path, n_before: int) -> None:
        self.file = tempfile.SpooledTemporaryFile(_ROWS_IN_MEMORY_BYTES, dir=str(folder))  # noqa: SIM115
        self._pages = PageWriter(cast(BinaryIO, self.file))
        for start in range(0, n_before // 8, 1 << 20):
            self._pages.append(b"\xff" * min(1 << 20, n_before // 8 - start))
        self._rest: NDArray[np.bool_] = np.ones(n_before % 8, np.bool_)

    def append(self, trained: NDArray[np.bool_]) -> None:
        trained = np.concatenate([self._rest, trained])
        whole = len(trained) - len(trained) % 8
        self._pages.append(np.packbits(trained[:whole], bitorder="little").tobytes())
        self._rest = trained[whole:]

    def finish(self) -> int:
        """Write what is left; return the checksum of all."""
        self._pages.append(np.packbits(self._rest, bitorder="little").tobytes())
        self._pages.finish()
        return self._pages.checksum


class _NotCommitted(Exception):
    """Makes ``whole_file`` discard a file that was not committed."""


class TokenFileWriter:
    """Writer of a token file, which appears at the end if ``commit`` was called.

    Use it under the lock of the cache. Documents are tokenised in chunks, which bound the memory. ``source``
    is the text file, for messages.

    Raises:
        StorageError: the disk refuses.
        TextLostError: the tokenizer loses a part of a document.
        ChatTemplateError: the chat template does not take a conversation.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, source: Path) -> None:
        self._path, self._tokenizer, self._source = path, tokenizer, source
        self._chats = ChatEncoder(tokenizer)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._n_tokens = self._n_documents = 0
        self._waiting: list[_Document] = []
        self._n_chars = 0
        self._trained: TrainedBits | None = None
        self._is_whole = False

    def __enter__(self) -> TokenFileWriter:
        # Not synced, and no search for leftovers: there may be ten thousands of files in the folder.
        self._writing = whole_file(self._path, durable=False)
        self._file = self._writing.__enter__()
        self._tokens = PageWriter(self._file)
        # Rows come after all tokens; a file's few stay in memory until then.
        self._row_file = tempfile.SpooledTemporaryFile(_ROWS_IN_MEMORY_BYTES, dir=str(self._path.parent))
        self._rows = PageWriter(cast(BinaryIO, self._row_file))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._row_file.close()
            if self._trained is not None:
                self._trained.file.close()
        if kind is None and not self._is_whole:
            kind, error = _NotCommitted, _NotCommitted()
        self._writing.__exit__(kind, error, trace)

    def add(self, line: int, text: str, group: int = 0, messages: Sequence[Message] = ()) -> None:
        """Add a text; with ``messages`` it is theirs, and they are what is tokenised."""
        self._waiting.append(_Document(line, text, group, messages))
        self._n_chars += len(text)
        if self._n_chars >= _CHUNK_CHARS or len(self._waiting) >= _CHUNK_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        documents, self._waiting, self._n_chars = self._waiting, [], 0
        encoded = self._encoded(documents)
        rows = np.empty(len(encoded), DOCUMENT)
        rows["end"] = self._n_tokens + np.cumsum([len(ids) for ids, _ in encoded])
        rows["n_bytes"] = [
            answer_bytes(d.messages) if d.messages else len(d.text.encode()) for d in documents
        ]
        rows["key"] = [text_key(document.text) for document in documents]
        rows["group"] = [document.group for document in documents]
        rows["line"] = [document.line for document in documents]
        tokens = np.concatenate([ids for ids, _ in encoded])
        try:
            if self._trained is None and any(document.messages for document in documents):
                self._trained = TrainedBits(self._path.parent, self._n_tokens)
            if self._trained is not None:
                self._trained.append(np.concatenate([trained for _, trained in encoded]))
            self._tokens.append(tokens.astype(self._dtype, copy=False).tobytes())
            self._rows.append(rows.tobytes())
        except OSError as error:
            raise storage_error(self._path, error, False) from error
        self._n_tokens = int(rows["end"][-1])
        self._n_documents += len(rows)

    def _encoded(self, documents: Sequence[_Document]) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """Tokens of each document, BOS before and EOS behind them, and which of them are trained on."""
        texts = [document for document in documents if not document.messages]
        try:
            of_texts = iter(self._tokenizer.encode_batch([document.text for document in texts]))
        except TextLostError as error:
            raise error.at(f"{shown(self._source)}:{texts[error.index].line}") from None
        eos = np.array([self._tokenizer.eos_id], dtype=self._dtype)
        bos = np.array(self._tokenizer.encode_prompt(""), dtype=self._dtype)
        found = []
        for document in documents:
            if document.messages:
                found.append(self._of_conversation(document))
            else:
                ids = np.concatenate([bos, next(of_texts), eos])
                found.append((ids, np.ones(len(ids), np.bool_)))
        return found

    def _of_conversation(self, document: _Document) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        place = f"{shown(self._source)}:{document.line}"
        for message in document.messages:
            if loss := self._tokenizer.loss(message.content):
                raise TextLostError(self._tokenizer.name, loss, 0, place)
        try:
            tokens, trained = self._chats.record([message._asdict() for message in document.messages])
        except ChatTemplateError as error:
            raise error.at(place) from None
        return np.array(tokens, dtype=self._dtype), np.array(trained, np.bool_)

    def commit(self, bad: Problems | None = None) -> None:
        """Complete the file; ``bad`` are the lines that are not in it."""
        self._flush()
        bits = "" if self._trained is None else f"{self._trained.finish():08x}"
        summary = orjson.dumps(
            {
                "dtype": self._dtype.str,
                "tokens": self._n_tokens,
                "documents": self._n_documents,
                "checksum": f"{self._tokens.checksum:08x}{self._rows.checksum:08x}{bits}",
                "bits": self._trained is not None,
                "bad": bad_lines_of(bad) if bad is not None else [],
            }
        )
        try:
            self._tokens.finish()
            self._rows.finish()
            for part in (self._row_file, *([] if self._trained is None else [self._trained.file])):
                part.seek(0)
                while content := part.read(1 << 20):
                    self._file.write(content)
            self._file.write(summary)
            self._file.write(TRAILER.pack(MAGIC, len(summary), zlib.crc32(summary), FORMAT))
        except OSError as error:
            raise storage_error(self._path, error, False) from error
        self._is_whole = True
