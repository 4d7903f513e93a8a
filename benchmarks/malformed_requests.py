"""Malformed requests to `nanothink serve`: mutated, by schemathesis from its description, and by hand.

    python benchmarks/malformed_requests.py checkpoints/transformer_expert.pt

schemathesis (`pip install -e '.[bench]'`) makes requests that fit the description and such that do not,
and checks that each answer is one that the description has. Mutated requests are valid ones with a field of
another type, with bytes of their body or head changed, or cut off. What neither makes comes by hand:
bodies that are no JSON, too large, too deep or cut off, headers that lie, requests one after another on one
connection, clients that leave in the middle. Ends with 1 if an answer was wrong, or the server complained or
died.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
"""Rejection of what does not fit is not among them: neutral values of unsupported fields are accepted."""

_HOST = "Host: localhost\r\nConnection: close\r\n"
_JSON = f"{_HOST}Content-Type: application/json\r\n"


def _post(body: bytes, *, length: int | None = None, more: str = "") -> bytes:
    size = len(body) if length is None else length
    return f"POST /v1/completions HTTP/1.1\r\n{_JSON}{more}Content-Length: {size}\r\n\r\n".encode() + body


def _completion(**fields: object) -> bytes:
    return _post(json.dumps({"prompt": "a", "max_tokens": 2, **fields}).encode())


SENT: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "invalid UTF-8": (_post(b'{"prompt": "\xff\xfe"}'), (400,)),
    "a lone surrogate": (_post(b'{"prompt": "\\ud800"}'), (400,)),
    "a NUL": (_post(b'{"prompt": "\\u0000", "max_tokens": 1}'), (200,)),
    "deep JSON": (_post(b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), (400,)),
    "a deep field": (
        _post(b'{"prompt": "a", "metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}"),
        (200, 400),
    ),
    "NaN": (_post(b'{"prompt": "a", "temperature": NaN}'), (400,)),
    "infinity": (_post(b'{"prompt": "a", "temperature": 1e999}'), (400,)),
    "a negative number": (_completion(max_tokens=-1), (400,)),
    "a huge number": (_post(b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}"), (400,)),
    "a boolean for a number": (_completion(max_tokens=True), (400,)),
    "an empty body": (_post(b""), (400,)),
    "an array": (_post(b"[1, 2]"), (400,)),
    "two fields of a name": (_post(b'{"prompt": "a", "prompt": 5}'), (400,)),
    "a body of 8 MiB": (_post(b'{"prompt": "' + b"a" * (8 << 20) + b'"}'), (413,)),
    "a prompt of 4 MiB": (_post(b'{"prompt": "' + b"ab " * 1_390_000 + b'"}'), (400,)),
    "100,000 stops": (_completion(stop=["a"] * 100_000), (400,)),
    "a path": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (400, 404)),
    "an escaped path": (
        b"GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        (404,),
    ),
    "a file as model": (_completion(model="/etc/passwd"), (404,)),
    "a file as prompt": (_completion(prompt="file:///etc/passwd", max_tokens=0, echo=True), (200,)),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", (400, 421)),
    "two lengths": (_post(b"{}", more="Content-Length: 7\r\n"), (400,)),
    "a negative length": (_post(b"", length=-5), (400,)),
    "a length and chunks": (_post(b"0\r\n\r\n", more="Transfer-Encoding: chunked\r\n"), (400,)),
    "bad chunks": (
        f"POST /tokenize HTTP/1.1\r\n{_JSON}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
        (400,),
    ),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00" * 20 + b"\r\n\r\n", (400,)),
    "a header of 1 MiB": (b"GET /health HTTP/1.1\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n", (400, 431)),
    "another method": (b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (405,)),
    "another page's host": (
        b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        (421,),
    ),
}
"""Requests on a connection of their own, and statuses that are an answer to them."""


def answer(port: int, sent: bytes, *, whole: bool = True) -> bytes:
    """Everything that comes back; empty where the server closed without a word.

    ``whole`` is False where more may be announced than is sent: the client then says that it has ended.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        found = b""
        try:
            connection.sendall(sent)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                found += piece
        except ConnectionError:
            pass  # it may close before it has read everything
    return found


def by_hand(port: int) -> list[str]:
    """Names of the requests that were answered wrongly, with the answer."""
    wrong = []
    for name, (sent, statuses) in SENT.items():
        found = answer(port, sent)
        status = int(found[9:12] or 0) if found.startswith(b"HTTP/1.1 ") else 0
        torn = status == 0 and name in (
            "a body of 8 MiB",
            "a header of 1 MiB",
            "no HTTP",
        )  # closed while being read
        if status not in statuses and not torn:
            wrong.append(f"{name}: {found[:200]!r}")
    for check in (_pipelined, _cut_off, _slow, _leaving):
        if problem := check(port):
            wrong.append(problem)
    return wrong


VALID: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "a b", "max_tokens": 2, "n": 2, "stop": ["x"], "logprobs": 2, "seed": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True},
    "/tokenize": {"prompt": "a b"},
    "/detokenize": {"tokens": [1, 2]},
}
ODD: tuple[object, ...] = (
    *(None, True, -1, 0, 2**70, 1e308, "", "\0", "a" * 5000, "\u202e"),
    *([], [[]], [None], {}, {"a": {}}, [2**40]),
)
"""Values that a field may be given instead of its own."""


def mutated(rng: random.Random) -> tuple[bytes, bool]:
    """A request; whether an answer must come, which is so unless its head was changed."""
    path, fields = rng.choice(list(VALID.items()))
    kind = rng.choice(("field", "body", "cut", "head"))
    if kind == "field":
        fields = {**fields, rng.choice([*fields, "temperature", "top_p", "stream", "echo"]): rng.choice(ODD)}
    body = bytearray(json.dumps(fields), "utf-8")
    if kind == "cut":
        del body[rng.randrange(len(body)) :]
    if kind == "body":
        _change(body, rng)
    head = bytearray(f"POST {path} HTTP/1.1\r\n{_JSON}Content-Length: {len(body)}\r\n\r\n", "ascii")
    if kind == "head":
        _change(head, rng)
    return bytes(head + body), kind != "head"


def _change(text: bytearray, rng: random.Random) -> None:
    """Put another byte in the place of some, or insert or delete some."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text))
        text[start : start + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))


def by_mutation(port: int, n_requests: int, n_workers: int, seed: int) -> list[str]:
    """The requests that were answered by an error of the server or, with an intact head, not at all."""

    def sent(number: int) -> str | None:
        request, must_answer = mutated(random.Random(f"{seed} {number}"))
        found = answer(port, request, whole=must_answer)
        status = found[9:12] if found.startswith(b"HTTP/1.1 ") else b""
        fine = status.startswith((b"2", b"4")) or not (status or must_answer)
        return None if fine else f"{request!r}: {found[:200]!r}"

    with ThreadPoolExecutor(n_workers) as pool:
        return [wrong for wrong in pool.map(sent, range(n_requests)) if wrong]


def _pipelined(port: int) -> str | None:
    first = _completion(max_tokens=1).replace(b"Connection: close\r\n", b"")
    found = answer(port, first * 5 + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    n_answers = found.count(b"HTTP/1.1 200 OK")
    return None if n_answers == 6 else f"six requests at once got {n_answers} answers"


def _cut_off(port: int) -> str | None:
    """Bodies that never come whole, from clients that leave."""
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(_post(b'{"prompt": "a', length=5000))
    return None


def _slow(port: int) -> str | None:
    """A hundred clients that send a byte now and then hold nobody up."""
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for turn in range(5):
        for connection in slow:
            connection.sendall(b"POST /v1/comp"[turn : turn + 1])
        time.sleep(0.05)
    begun = time.monotonic()
    found = answer(port, _completion(max_tokens=1))
    seconds = time.monotonic() - begun
    for connection in slow:
        connection.close()
    return (
        None if b"200 OK" in found[:20] and seconds < 10 else f"slow clients: {seconds:.1f} s, {found[:80]!r}"
    )


def _leaving(port: int) -> str | None:
    """Clients that leave in the middle of a stream free their places."""
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(_completion(stream=True, max_tokens=4, n=4))
            connection.recv(40)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if json.load(urlopen(f"http://127.0.0.1:{port}/health"))["texts"] == 0:
            return None
        time.sleep(0.1)
    return "texts of clients that left are still being written"


def by_schemathesis(
    port: int, n_examples: int, n_workers: int, seed: int, seconds: float, folder: Path
) -> tuple[int, str]:
    """Number of requests, and what it found wrong."""
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which(
        "schemathesis"
    )
    if program is None:
        raise SystemExit("schemathesis is not installed: pip install -e '.[bench]'")
    report = folder / "events.ndjson"
    command = [program, "run", f"http://127.0.0.1:{port}/openapi.json", "--checks", CHECKS]
    command += [
        "--phases",
        "coverage,fuzzing",
        "--max-examples",
        str(n_examples),
        "--seed",
        str(seed),
        "--workers",
        str(n_workers),
        "--no-shrink",
    ]
    command += ["--continue-on-failure", "--suppress-health-check", "all", "--warnings", "off"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(report), "--request-timeout", "60"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            said, _ = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:  # what it has found until then counts
            running.kill()
            said, _ = running.communicate()
    events = report.read_text("utf-8", "replace")
    failed = '"status":"failure"' in events or running.returncode not in (0, -9)
    return events.count('"request":{'), said[-4000:] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--examples", type=int, default=2000, help="of each operation, at most: some 10,000 in all"
    )
    parser.add_argument("--mutated", type=int, default=10_000, help="valid requests with something changed")
    parser.add_argument("--workers", type=int, default=4, help="threads that send, in each part")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1800, help="for schemathesis, at most")
    options = parser.parse_args()
    command = [sys.executable, "-m", "nanothink", "serve", str(options.checkpoint), "--port", "0"]
    command += ["--max-tokens", "4"]  # an answer is as good as a long one
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as server,
    ):
        assert server.stdout is not None
        port = int(server.stdout.readline().partition("/v1;")[0].rpartition(":")[2])
        said.truncate(0)
        begun = time.monotonic()
        try:
            wrong = by_hand(port)
            wrong += by_mutation(port, options.mutated, options.workers, options.seed)
            n_requests, found = by_schemathesis(
                port, options.examples, options.workers, options.seed, options.seconds, Path(name)
            )
            seconds = time.monotonic() - begun
            wrong += by_hand(port)  # it is what it was
            server.terminate()
            code = server.wait(90)
        finally:
            server.kill()
        said.seek(0)
        complaints = said.read().strip("\0")
    print("| mutated | by schemathesis | by hand | wrong answers | seconds |\n|---:|---:|---:|---:|---:|")
    counts = f"{options.mutated} | {n_requests} | {2 * (len(SENT) + 4)} | {len(wrong) + bool(found)}"
    print(f"| {counts} | {seconds:.0f} |")
    print("\n".join([*wrong, found, complaints]).strip())
    print(f"The server left with {code}.")
    return int(bool(wrong or found or "Traceback" in complaints or code))


if __name__ == "__main__":
    sys.exit(main())
