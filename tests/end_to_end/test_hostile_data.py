"""Nasty files through the commands: a place and a reason for each, never a traceback, bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanothink.cli.app import run

GOOD = b"".join(b'{"text": "All is well here today, number %d."}\n' % i for i in range(30))
DEEP = 100_000

NASTY: dict[str, tuple[bytes, str]] = {
    "invalid UTF-8": (b'{"text":"\xff\xfe"}\n', ":1:10: byte 0xff is not valid UTF-8"),
    "raw surrogate": (b'{"text":"\xed\xa0\x80"}\n', ":1:10: byte 0xed is not valid UTF-8"),
    "lone surrogate": (b'{"text":"\\ud800"}\n', ":1:10: \\ud800 is half of a surrogate pair"),
    "raw NUL": (b'{"text":"a\0b"}\n', ":1:11: not JSON: invalid control character, found U+0000"),
    "BOM inside": (
        GOOD + b"\xef\xbb\xbf" + GOOD,
        ":31:1: not JSON: expecting value, found a byte-order mark",
    ),
    "bare CR": (GOOD.replace(b"\n", b"\r"), ":1:46: lines end in a bare carriage return"),
    "UTF-16": (GOOD.decode().encode("utf-16"), ":1:1: the file is UTF-16"),
    "deep arrays": (b'{"text":"x","a":' + b"[" * DEEP + b"]" * DEEP + b"}\n", ":1:1: nested too deeply"),
    "deep objects": (
        b'{"text":"x","a":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}\n",
        ":1:1: nested too deeply",
    ),
    "NaN": (b'{"text":"x","z":NaN}\n', ":1:17: NaN is not JSON"),
    "infinity": (b'{"text":"x","z":-Infinity}\n', ":1:17: -Infinity is not JSON"),
    "array": (b"[1,2]\n", ":1:1: a record must be a JSON object, not an array"),
    "string": (b'"x"\n', ":1:1: a record must be a JSON object, not a string"),
    "number": (b"12\n", ":1:1: a record must be a JSON object, not an integer"),
    "null": (b"null\n", ":1:1: a record must be a JSON object, not null"),
    "empty text": (b'{"text":""}\n', ":1:9: `text` is empty"),
    "blank text": ('{"text":" \\n\\t\u2003\u00a0"}\n'.encode(), ":1:9: `text` is whitespace alone"),
    "wrong type": (GOOD + b'{"text":["a"]}\n', ":31:9: `text` must be a string, not an array"),
    "wrong key": (b'{"[/red]\\u001b[31m":"x"}\n', ":1:1: the key `text` is missing"),
    "cut": (GOOD + b'{"text":"abc', ":31:9: not JSON: unterminated string"),
    "no record": (b"\n\n  \n", "the file holds no record"),
    "nothing": (b"", "the file holds no record"),
    "noise": (bytes(range(256)) * 20, ":1:"),
}
NAMES = [
    "with space",
    "quo'te\"s",
    "日本語",
    "[red]",
    "\x1b[31mred",
    "new\nline",
    "%s{}",
    "a" * 200,
]


def shown(*command: str | Path) -> tuple[int, str]:
    """Exit code and all that is printed. An exception that is no refusal comes through."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = run([str(part) for part in command])
    return code, told.getvalue()


def place(root: Path, content: bytes, *, name: str = "a.jsonl", domain: str = "odd") -> Path:
    folder = root / domain
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("name", NASTY)
def test_every_command_says_where_and_why(name: str, tmp_path: Path, tiny_tokenizer: Path) -> None:
    content, reason = NASTY[name]
    domain = NAMES[sorted(NASTY).index(name) % len(NAMES)]
    path = place(tmp_path / "data", content, domain=domain)
    code, told = shown("data", "validate", tmp_path / "data")
    assert code == 1
    assert reason in told
    assert "\x1b" not in told
    code, told = shown("data", "validate", tmp_path / "data", "--json")
    report = json.loads(told)
    assert not report["ok"]
    assert {"file", "line", "column", "reason"} == set(report["errors"][0])

    own = ("--tokenizer", tiny_tokenizer)
    where = ("--data-dir", tmp_path / "data", "--checkpoint-dir", tmp_path / "checkpoints")
    for command in (
        ("data", "inspect", tmp_path / "data", *own),
        ("pretrain", "transformer", *where, *own, "--max-steps", "1", "--dry-run"),
        ("data", "import", path, "--domain", "new", "--data-dir", tmp_path / "imported"),
    ):
        code, told = shown(*command)
        assert code in (0, 1)
        assert code == 0 or told.strip()
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize(
    "suffix", [".csv", ".tsv", ".json", ".txt", ".md", ".parquet", ".jsonl.gz", ".jsonl.zst"]
)
def test_importing_any_of_it_as_anything(suffix: str, tmp_path: Path) -> None:
    for i, (content, _) in enumerate(NASTY.values()):
        source = tmp_path / f"{i}{suffix}"
        source.write_bytes(content)
        code, told = shown("data", "import", source, "--domain", f"d{i}", "--data-dir", tmp_path / "data")
        assert code in (0, 1)
        assert code == 0 or 0 < len(told.strip()) < 2000


def test_what_is_odd_but_sound(tmp_path: Path, tiny_tokenizer: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n"),
        b'{"text":"a\\u0000b","z":1e999999,"deep":' + b"[" * 900 + b"]" * 900 + b"}\r\n",
        b'{"text":"one","text":"two","id":' + b"9" * 100 + b"}\n",
        '{"text":"\\ud83d\\ude00 \u202e"}'.encode(),
    ]
    place(tmp_path, b"".join(lines))
    code, told = shown("data", "validate", tmp_path)
    assert code == 0
    assert "byte-order mark" in told
    assert ":31:11: `text` holds a NUL character" in told
    assert ":32:15: the key `text` stands more than once" in told
    assert shown("data", "inspect", tmp_path, "--tokenizer", tiny_tokenizer)[0] == 0


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.lists(st.sampled_from([*GOOD.splitlines(True)[:2], *(c[:300] for c, _ in NASTY.values())])).map(
            b"".join
        ),
        st.recursive(
            st.none() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
            ),
        ).map(lambda value: json.dumps({"text": "x", "more": value}).encode()),
    ),
    packed=st.sampled_from(["", ".gz", ".zst"]),
    cut=st.integers(0, 40),
)
def test_no_bytes_whatever_end_in_a_traceback(
    content: bytes, packed: str, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("any")
    if packed == ".gz":
        content = gzip.compress(content)
        content = content[: max(0, len(content) - cut)]
    place(root, content, name=f"a.jsonl{packed}")
    code, told = shown("data", "validate", root, "--json")
    report = json.loads(told)
    assert code == (0 if report["ok"] else 1)
    assert all(e["line"] >= 0 and e["column"] >= 0 and e["reason"] for e in report["errors"])
    assert shown("data", "import", root / "odd" / f"a.jsonl{packed}", "--domain", "x", "--data-dir", root)[
        0
    ] in (0, 1)


def test_links_in_circles_and_pipes(tmp_path: Path) -> None:
    place(tmp_path, GOOD)
    (tmp_path / "odd" / "self.jsonl").symlink_to("self.jsonl")
    (tmp_path / "odd" / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "odd" / "up").symlink_to("..")
    (tmp_path / "round").symlink_to("round")
    os.mkfifo(tmp_path / "odd" / "pipe.jsonl")
    code, told = shown("data", "validate", tmp_path)
    assert code == 1
    assert "self.jsonl:1:1: Too many levels of symbolic links" in told
    assert "gone.jsonl:1:1: the link points to a file that does not exist" in told
    assert "pipe.jsonl:1:1: it is not a regular file" in told
    assert shown("data", "import", tmp_path / "odd", "--domain", "x", "--data-dir", tmp_path / "new")[0] == 1


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """Cut, grown and replaced under the reader: a verdict each time."""
    path = place(tmp_path, GOOD * 4000)
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for content in (GOOD * 4000, GOOD[:100], b""):
                path.write_bytes(content)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        assert all(shown("data", "validate", tmp_path)[0] in (0, 1) for _ in range(10))
    finally:
        ended.set()
        changer.join()


def test_a_line_of_200_megabytes_and_a_deep_one_in_bounded_memory(tmp_path: Path) -> None:
    path = place(tmp_path, GOOD)
    with path.open("ab") as file:
        file.write(b'{"text":"')
        for _ in range(200):
            file.write(b"a" * 10**6)
        file.write(b'"}\n' + NASTY["deep arrays"][0] + GOOD)
    child = f"""
import re
from nanothink.cli.app import run
code = run(["data", "validate", {str(tmp_path)!r}])
print(code, int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()).group(1)) >> 10)
"""
    ended = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert not ended.stderr
    assert ":31:1: the line is longer than 64 MiB" in ended.stdout
    assert ":32:1: nested too deeply" in ended.stdout
    assert "60 records" in ended.stdout
    code, peak_mb = ended.stdout.splitlines()[-1].split()
    assert code == "1"
    assert int(peak_mb) < 250
