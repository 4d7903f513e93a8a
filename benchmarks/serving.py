"""`nanothink serve` under load: texts per second by the number of clients, latency, and nothing lost.

    python benchmarks/serving.py checkpoints/transformer_expert.pt

Clients are threads of another process, each with its own connection, that ask for one text after another.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Load:
    """Figures of one number of clients."""

    n_clients: int
    seconds: float
    latencies: list[float]
    n_lost: int
    """Requests without a whole answer."""
    n_tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds

    def row(self) -> str:
        p50, p99 = np.percentile(self.latencies, [50, 99])
        counts = f"| {self.n_clients} | {len(self.latencies)} | {self.n_lost} "
        return f"{counts}| {self.tokens_per_second:.0f} | {p50:.3f} | {p99:.3f} |"


def n_written(answer: http.client.HTTPResponse, stream: bool) -> int:
    """Tokens of an answer, by its own account."""
    if not stream:
        return int(json.loads(answer.read())["usage"]["completion_tokens"])
    *_, usage, end, rest = answer.read().split(b"\n\n")
    assert (end, rest) == (b"data: [DONE]", b"")
    return int(json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"])


def clients(port: int, n_clients: int, seconds: float, n_tokens: int, stream: bool, found: Any) -> None:
    """Ask for texts for so many seconds; puts (latencies, lost, tokens) into a queue."""
    latencies: list[float] = []
    lost = 0
    written = 0
    lock = threading.Lock()
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        nonlocal lost, written
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        turn = 0
        while time.monotonic() < end:
            turn += 1
            body = {
                "prompt": f"def f{number}_{turn}(",
                "max_tokens": n_tokens,
                "ignore_eos": True,
                "seed": turn,
                **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
            }
            begun = time.monotonic()
            try:
                connection.request(
                    "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
                )
                n_got = n_written(connection.getresponse(), stream)
            except (OSError, AssertionError, ValueError, KeyError, http.client.HTTPException):
                n_got = 0
            with lock:
                latencies.append(time.monotonic() - begun)
                lost += n_got != n_tokens
                written += n_got

    threads = [threading.Thread(target=client, args=(number,)) for number in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.put((latencies, lost, written))


def measure(port: int, n_clients: int, seconds: float, n_tokens: int, stream: bool) -> Load:
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=clients, args=(port, n_clients, seconds, n_tokens, stream, found))
    process.start()
    latencies, lost, written = found.get()
    process.join()
    return Load(n_clients, seconds, latencies, lost, written)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each number of clients")
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--stream", action="store_true", help="ask for texts as they come")
    options = parser.parse_args()
    command = [sys.executable, "-m", "nanothink", "serve", str(options.checkpoint), "--port", "0"]
    command += ["--max-batch", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().partition("/v1;")[0].rpartition(":")[2])
        measure(port, 2, 2.0, options.tokens, options.stream)  # the first steps build and warm up
        print("| clients | texts | lost | tokens/s | p50 (s) | p99 (s) |\n|---:|---:|---:|---:|---:|---:|")
        for n_clients in options.clients:
            load = measure(port, n_clients, options.seconds, options.tokens, options.stream)
            print(load.row(), f"(load average {os.getloadavg()[0]:.1f})", flush=True)
        server.terminate()
    print(f"The server left with {server.returncode}.")


if __name__ == "__main__":
    main()
