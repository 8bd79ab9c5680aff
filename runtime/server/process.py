"""The server as a process: its port, its signals and its end."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn

from stg_trt.errors import InvalidRequest

from .app import create_app
from .service import Service

# What remains after a drain: answers that are being sent.
_LAST_ANSWERS_S = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket of its own; raises InvalidRequest if the address is taken or is none of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(
            f"port: expected an address that is free here, got {host} port {port} ({reason}): choose another "
            "--host or --port"
        ) from error


def serve_until_told(service: Service, listening: socket.socket) -> None:
    """Answers requests until SIGTERM, SIGINT, or a warm-up that fails, whose error is raised."""
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )
    server = _Server(config, service)
    threading.Thread(target=server.watch_worker, daemon=True).start()
    service.start()
    try:
        server.run(sockets=[listening])
    finally:
        service.stop()
    if service.workers.failure is not None:
        raise service.workers.failure


class _Server(uvicorn.Server):
    """On SIGTERM it goes on answering while the running video is made; a second signal does not wait."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal; uvicorn's own would raise it again once the server has ended."""
        self._signals += 1
        patient = self._signals == 1 and sig == signal.SIGTERM
        wait_s = self._service.settings.drain_seconds if patient else 0
        # A handler must not wait for locks that its own thread may hold.
        threading.Thread(target=self._drain, args=(wait_s,), daemon=True).start()

    def watch_worker(self) -> None:
        """Ends the server if there is no worker any more."""
        self._service.workers.ended.wait()
        self.should_exit = True

    def _drain(self, wait_s: float) -> None:
        if wait_s:
            # The first word of an operator's log is why nothing new is taken.
            print("stg-trt: finishing the running video, waiting ones are kept", file=sys.stderr)
        self._service.drain(wait_s)
        self.should_exit = True


def url_of(listening: socket.socket) -> str:
    """Where clients find it."""
    host, port, *_ = listening.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(host: str) -> bool:
    """True if only programs of this machine reach it."""
    return host in ("localhost", "::1") or host.startswith("127.")
