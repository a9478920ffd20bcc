"""uvicorn under this project's way to end: a signal lets all that was accepted be answered, a second one does not."""

import asyncio
import logging
import os
import resource
import socket
from contextlib import suppress
from types import FrameType

import uvicorn

from errors import UserError, reason, shown
from parallel import started
from serving.app import Server

LINGER = 5  # seconds for connections that are closed while their clients do not read
BACKLOG = 2048


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError if none can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # each connection is a file
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        [family, *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"cannot listen on --host {shown(host)} --port {port}: {why}; give others") from error


class Listener(uvicorn.Server):
    """Answers on a socket until a signal comes."""

    def __init__(self, server: Server, listener: socket.socket):
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not that a client has sent what is no HTTP
        config = uvicorn.Config(
            server.app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=LINGER,
        )
        super().__init__(config)
        self.server, self.listener, self.loop = server, listener, None

    def serve_until_told(self) -> None:
        asyncio.run(self._serve_all())

    async def _serve_all(self) -> None:
        self.loop = self.server.worker.loop = asyncio.get_running_loop()
        self.server.drained = lambda: setattr(self, "should_exit", True)
        self.server.worker.died = self._died
        await self.serve(sockets=[self.listener])

    def _died(self) -> None:
        """The engine thread says that it has ended: nobody can be answered any more."""
        self.should_exit = self.force_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn calls it for a signal. It is not raised again afterwards: this is a good end."""
        if self.server.draining and started() == 1:  # torchrun repeats a Ctrl-C, and ends all after half a minute
            os._exit(128 + sig)
        self.server.draining = True
        self.loop.call_soon_threadsafe(self.server.check_drained)
