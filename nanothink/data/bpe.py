"""Training of a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2, Radford et al. 2019).

    learn       in this process: the reference, silent and not to be interrupted
    serve       the same in a child process, which data/bpe_process.py starts

``serve`` reads texts from standard input, each as its length in bytes (8 bytes, little-endian, signed) and
the text in UTF-8; a length of -1 ends them. It writes lines to one pipe: the library's progress (``{"stage":
..., "current": ..., "total": ...}``), Python's own messages, and the tokenizer.

This module imports nothing but the library, so that the process starts in a twentieth of a second.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import tokenizers

MAX_WORD_BYTES = 256
"""Longest word that merges are learnt from; a longer one is cut into several.

The library's time for a word grows with the square of its length: 80,000 dots in a row took 3.7 s, and with
the cap 400,000 take 0.1 s. In 17 MB of English and code the cap changed no merge."""

LENGTH = struct.Struct("<q")
END = -1
RESULT = b"tokenizer: "

_NOT_FOR_THIS_ONE = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)


def make_byte_level(backend: tokenizers.Tokenizer) -> None:
    """Give a tokenizer GPT-2's pre-tokenizer and decoder."""
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()


def learn(
    texts: Iterable[str], vocab_size: int, eos: str, *, show_progress: bool = False
) -> tokenizers.Tokenizer:
    """Train on ``texts``: a vocabulary of ``vocab_size`` entries or fewer, with all 256 bytes and ``eos``.

    With ``show_progress`` the library writes its progress to file descriptor 2, as lines of JSON.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    make_byte_level(backend)
    capped = tokenizers.pre_tokenizers.FixedLength(MAX_WORD_BYTES)  # a byte is a character by now
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([backend.pre_tokenizer, capped])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[eos],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
        progress_format="json" if show_progress else "silent",
    )
    backend.train_from_iterator(texts, trainer)
    make_byte_level(backend)
    return backend


def serve(vocab_size: int, eos: str) -> None:
    """Train on the texts from standard input. Exit if the pipe ends before they do: the parent is gone."""
    for number in _NOT_FOR_THIS_ONE:  # they reach the one who started this, who decides
        signal.signal(number, signal.SIG_IGN)
    backend = learn(_texts(sys.stdin.buffer), vocab_size, eos, show_progress=True)
    sys.stdout.buffer.write(RESULT + backend.to_str().encode() + b"\n")


def _texts(pipe: BinaryIO) -> Iterator[str]:
    while True:
        length = int.from_bytes(_exactly(pipe, LENGTH.size), "little", signed=True)
        if length == END:
            return
        yield _exactly(pipe, length).decode()


def _exactly(pipe: BinaryIO, n_bytes: int) -> bytes:
    found = pipe.read(n_bytes)
    if len(found) < n_bytes:
        os._exit(1)
    return found
