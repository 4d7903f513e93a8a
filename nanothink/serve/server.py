"""Running the application: the address, signals, and the end."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn

from nanothink.data.chat import ChatEncoder, ChatFormat
from nanothink.data.chat_process import ChatTemplateError
from nanothink.errors import UsageError
from nanothink.runs.trained_model import TrainedModel
from nanothink.serve.app import Access, build_app
from nanothink.serve.chat import Chats
from nanothink.serve.endpoints import Limits, ServedModel
from nanothink.suggestions import suggest

_DRAIN_SECONDS = 60
"""For the texts that are being written when the server is told to stop."""

_IDLE_SECONDS = 75
"""Before an idle connection is closed: longer than clients keep one, or they use it as it goes."""

_NAMES = ("localhost", "127.0.0.1", "::1")


def served_models(loaded: Sequence[TrainedModel], chat_template: str | None) -> list[ServedModel]:
    """Open models under the names of their files.

    Raises:
        UsageError: two files have the same name, or the template is none.
    """
    served: dict[str, ServedModel] = {}
    for one in loaded:
        name = one.path.stem if one.path.is_file() else one.path.resolve().name
        if name in served:
            raise UsageError(f"{served[name].loaded.path} and {one.path} would both be called {name}.")
        tokenizer = one.tokenizer
        if chat_template is not None:
            special = dict(tokenizer.chat.special_tokens) if tokenizer.chat else {}
            chat = ChatFormat.of(chat_template, special)
            if chat is None:
                raise UsageError("The chat template is empty or too long.")
            tokenizer = tokenizer.with_chat(chat)
            try:
                ChatEncoder(tokenizer).check()
            except ChatTemplateError as error:
                raise UsageError(f"The chat template cannot be used: {error.reason}.") from None
        served[name] = ServedModel(name, one, Chats(tokenizer), int(one.path.stat().st_mtime))
    return list(served.values())


def url_of(bound: socket.socket) -> str:
    """The address of a server that listens there."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach that address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower() == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 for any that is free.

    Raises:
        UsageError: the address cannot be had.
    """
    bound: socket.socket | None = None
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)
    except OSError as error:
        if bound is not None:
            bound.close()
        reason = f"Cannot listen at {host}, port {port}: {error.strerror or error}."
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            here = suggest("serve --host 127.0.0.1")
            raise UsageError(
                f"{reason} That is no address of this machine; for itself alone: {here}"
            ) from None
        another = port + 1 if 1023 < port < 65_535 else 8001  # those below are the system's
        raise UsageError(f"{reason} Choose another: {suggest('serve --port', another)}") from None
    return bound


def build_server(
    models: Sequence[ServedModel],
    access: Access,
    limits: Limits,
    *,
    note: Callable[[str], None],
    on_ready: Callable[[], None] = lambda: None,
) -> uvicorn.Server:
    """A server whose ``run(sockets=[...])`` serves until a signal, or its ``should_exit``, asks to stop.

    It then takes no more requests, and finishes those that are under way.

    Args:
        note: hears what goes wrong.
        on_ready: called when the first request can come.
    """

    def on_failure(error: BaseException) -> None:
        trace = "".join(traceback.format_exception(error))
        note(f"A request failed, which is a fault of the server:\n{trace}")

    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # invalid HTTP is the client's affair
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # as are writes to one that has left
    config = uvicorn.Config(
        build_app(models, access, limits, on_failure=on_failure),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        timeout_keep_alive=_IDLE_SECONDS,
        h11_max_incomplete_event_size=65_536,
    )
    return _Server(config, on_ready)


class _Server(uvicorn.Server):
    """Says when it is ready, and takes a stop by signal for an ordinary end."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self.should_exit = self.force_exit = False  # as the base class has it

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The base class raises the signals once more at the end, as if they had gone unanswered."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: object) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def read_secret(given: str) -> str:
    """An API key as it was given, or the content of the file after ``@``.

    Raises:
        UsageError: the file cannot be read, or there is no key.
    """
    if given.startswith("@"):
        try:
            given = Path(given[1:]).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The file of the API key cannot be read: {error}.") from None
    if not given.strip():
        raise UsageError("The API key is empty.")
    return given.strip()


def access(host: str, api_key: str | None, origins: Sequence[str]) -> Access:
    """Who may ask a server at ``host``.

    Raises:
        UsageError: other machines could, and no key is asked for.
    """
    key = None if api_key is None else read_secret(api_key)
    if is_loopback(host):
        return Access(key, _NAMES, tuple(origins))
    if key is None:
        raise UsageError(
            f"At {host} other machines reach this server, so it needs a key: --api-key @FILE, where FILE "
            "holds a secret. Without one it serves this machine alone: --host 127.0.0.1"
        )
    return Access(key, None, tuple(origins))
