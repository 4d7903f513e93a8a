"""Token files of a corpus: found in the cache, or built.

Tokens are looked up by the digest of the file's content; missing ones are built (token_files.py). The same
content in two places is tokenised once. The bytes are hashed while they are tokenised, so tokens are never
kept under the digest of content that they do not cover.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nanothink.data.cache import cache_folder
from nanothink.data.chat import PLAIN
from nanothink.data.corpus import Corpus, bad_records_error, left_out
from nanothink.data.encoding import Tokenizer
from nanothink.data.lines import shown
from nanothink.data.pages import OpenFiles
from nanothink.data.problems import Problems
from nanothink.data.records import ignored, iter_records
from nanothink.data.split import SplitRule, cut_text, group_key, normalised, text_key
from nanothink.data.token_files import (
    SUFFIX,
    BadLines,
    Manifest,
    TokenFile,
    bad_lines_of,
    is_whole,
    named_in,
    new_digest,
    open_token_file,
)
from nanothink.data.token_writer import TokenFileWriter
from nanothink.disk import locked, make_folder, storage_error, sweep_folder
from nanothink.errors import DataError, StorageError
from nanothink.reporter import Reporter


@dataclass(frozen=True)
class Cut:
    """The only text of a domain, cut into two or three documents that train, validate and test."""

    name: str
    file: TokenFile
    trained_chars: int
    """Normalised characters of the head."""


class TokenBuilder:
    """Builder of the tokens of one corpus by one tokenizer.

    Args:
        skip: leave bad lines out instead of raising BadRecordsError.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, skip: bool, reporter: Reporter) -> None:
        self._corpus, self._tokenizer, self._skip, self._reporter = corpus, tokenizer, skip, reporter
        self._cache = cache_folder(corpus.root, reporter)
        self._folder = self._cache / "tokens" / _folder_name(tokenizer)
        self._open_files = OpenFiles()
        self._advance = reporter.counter("tokenising", corpus.n_bytes)
        self._found_bad = False
        self.left_out = Problems()
        """Bad lines of the files; complete when ``files`` has returned."""

    def files(self) -> dict[str, list[tuple[str, TokenFile]]]:
        """Return digest and tokens of every file, by domain, in the corpus's order.

        Raises:
            UnreadableError: a file could not be read, whether or not bad lines are skipped.
            BadRecordsError: there are bad lines, and they are not skipped.
            StorageError: the tokens cannot be written.
        """
        manifest = Manifest(self._cache / "manifest.json")
        sizes: dict[str, int] = {}
        digests: dict[Path, str] = {}
        ready: dict[str, TokenFile] = {}
        missing: dict[str, Path] = {}
        for _, path in self._corpus.files:
            digest, size = manifest.digest(path, self._corpus.root, time.time_ns())
            digests[path], sizes[digest] = digest, size
            found = ready.get(digest) or self._opened(path, digest)
            if found is not None:
                ready[digest] = found
            elif digest not in missing:
                missing[digest] = path
                continue
            self._advance(size)
        bad: dict[str, BadLines] = {digest: file.bad for digest, file in ready.items()}
        if missing or manifest.has_news:
            with locked(self._cache, self._reporter):
                manifest.save()
                try:
                    make_folder(self._folder, within=self._cache)
                    sweep_folder(self._folder)
                except OSError as error:
                    raise storage_error(self._folder, error) from error
                for digest, path in missing.items():
                    found = self._opened(path, digest)  # another process may have made it meanwhile
                    if found is not None:
                        self._advance(sizes[digest])
                        bad[digest] = found.bad
                    else:
                        bad[digest] = self._make(path, digest, self._advance)
                        found = self._opened(path, digest)
                    if found is not None:
                        ready[digest] = found
        self._settle_bad_lines(bad, digests)
        return {
            domain: [(digests[path], self._named(ready, digests[path], path)) for path in paths]
            for domain, paths in self._corpus.domains.items()
        }

    def cut(self, key: int, paths: Sequence[Path], domain: str, split: SplitRule, trained_chars: int) -> Cut:
        """Cut the text of that key; the first part holds at least the characters trained on already."""
        _, text = self._find(key, paths, domain)
        parts = [part for part in cut_text(text, split, domain, trained_chars) if part]
        lengths = [len(part) for part in parts]
        name = f"cut-{key:016x}-{'-'.join(map(str, lengths))}"
        make = partial(self._make_cut, name, key, paths, lengths)
        if open_token_file(self._path(name), self._open_files) is None:
            make()
        found = open_token_file(self._path(name), self._open_files, make)
        return Cut(name, self._checked(found, name, paths[0]), len(normalised(parts[0])))

    def _path(self, name: str) -> Path:
        return self._folder / (name + SUFFIX)

    def _opened(self, path: Path, digest: str) -> TokenFile | None:
        again = partial(self._make_again, path, digest)
        return open_token_file(self._path(digest), self._open_files, again)

    def _named(self, ready: Mapping[str, TokenFile], digest: str, path: Path) -> TokenFile:
        return self._checked(ready.get(digest), digest, path)

    def _checked(self, found: TokenFile | None, name: str, path: Path) -> TokenFile:
        if found is None:
            raise StorageError(
                f"The tokens just written to {self._path(name)} read back differently. Check the disk, or "
                "set XDG_CACHE_HOME to another one."
            )
        return replace(found, path=os.path.relpath(path, self._corpus.root))

    def _find(self, key: int, paths: Sequence[Path], domain: str = "") -> tuple[int, str]:
        for path in paths:
            for line, record in iter_records(path, on_problem=ignored):
                if text_key(record.text) == key:
                    if record.messages:
                        raise DataError(
                            f"Domain '{domain}' holds a single conversation, which cannot be cut into a part "
                            "to train on and one to validate on. Add another, or leave the domain out with "
                            "--domains."
                        )
                    return line, record.text
        raise _changed(paths[0])

    def _make(self, path: Path, digest: str, on_bytes: Callable[[int], None] | None = None) -> BadLines:
        """Tokenise a file and return its bad lines; keep nothing if these, or earlier ones, forbid it."""
        target = self._path(digest)
        if target.exists():
            self._reporter.note(
                f"The kept tokens of {path} are damaged, or an earlier version's; they are made again."
            )
        self._open_files.forget(target)
        bad = Problems()
        read = new_digest()
        with TokenFileWriter(target, self._tokenizer, path) as writer:
            for line, record in iter_records(path, on_problem=bad.add, on_bytes=on_bytes, digest=read):
                if self._keeps(bad):
                    group = group_key(record.group, record.source)
                    writer.add(line, record.text, group, record.messages)
            if read.hexdigest() != digest:
                raise _changed(path)
            if self._keeps(bad):
                writer.commit(bad)
        self._found_bad |= bool(bad)
        return bad_lines_of(bad)

    def _keeps(self, bad: Problems) -> bool:
        """Return whether tokens are still needed. If the corpus will be refused, files are only read, to
        report all bad lines at once."""
        return self._skip or not (bad or self._found_bad)

    def _make_again(self, path: Path, digest: str) -> None:
        """Rebuild a token file that is damaged or gone."""
        target = self._path(digest)
        with locked(self._cache, self._reporter):
            self._open_files.forget(target)
            if not is_whole(target, self._open_files):  # another process may have done it meanwhile
                self._make(path, digest)

    def _make_cut(self, name: str, key: int, paths: Sequence[Path], lengths: Sequence[int]) -> None:
        line, text = self._find(key, paths)
        target = self._path(name)
        with (
            locked(self._cache, self._reporter),
            TokenFileWriter(target, self._tokenizer, paths[0]) as writer,
        ):
            self._open_files.forget(target)
            start = 0
            for length in lengths:
                writer.add(line, text[start : start + length])
                start += length
            writer.commit()

    def _settle_bad_lines(self, bad: Mapping[str, BadLines], digests: Mapping[Path, str]) -> None:
        """Raise for bad lines, or note that they are left out."""
        for path, digest in digests.items():
            self.left_out.extend(named_in(shown(path), bad[digest]))
        if not self.left_out:
            return
        root = self._corpus.root
        if not self._skip:
            raise bad_records_error(root, self.left_out)
        self._reporter.note(f"Left out: {left_out(self.left_out, root)}")


def _folder_name(tokenizer: Tokenizer) -> str:
    """The tokens of a text depend on the tokenizer, those of a conversation on its template too."""
    name = tokenizer.fingerprint[:16]
    if tokenizer.chat in (None, PLAIN):
        return name
    digest = hashlib.blake2b(repr(tokenizer.chat).encode(), digest_size=4).hexdigest()
    return f"{name}-{digest}"


def _changed(path: Path) -> DataError:
    return DataError(f"{path} changed while it was being read; run the command again.")
