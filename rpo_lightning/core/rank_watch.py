"""Notices at once when a rank has gone, whatever the other ranks are doing.

A collective fails when a rank of it has gone, but a rank that samples for ten minutes is in none. Therefore each rank
holds a connection to the first one. The system closes it when a process ends, however it ends. Nothing is asked or
timed, so a rank that is merely slow is never taken for gone.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from rpo_lightning.core.errors import one_line
from rpo_lightning.core.ranks import Ranks

log = logging.getLogger(__name__)

SECONDS_TO_CONNECT = 60.0


class RankWatch:
    """Ends this process if another rank has gone. All ranks must make one together.

    Args:
        ranks: The ranks.
        grace: Seconds that this rank has to end by itself, with an error of the collective that it waits in.
    """

    def __init__(self, ranks: Ranks, grace: float = 20.0) -> None:
        self._rank = ranks.rank
        self._grace = grace
        self._causes: dict[int, str] = {}
        self._has_over: set[int] = set()
        self._gone: int | None = None
        server = _server() if self._rank == 0 else None
        mine = None if server is None else (*server.getsockname()[:2], secrets.token_hex(8))
        host, port, token = ranks.gather(mine)[0] or ("", 0, "")
        if server is not None:
            self._connections = _accept(server, ranks.size - 1, token)
        else:
            connection = socket.create_connection((host, port), SECONDS_TO_CONNECT)
            connection.settimeout(None)
            self._connections = {0: connection}
            self._send(0, {"token": token, "rank": self._rank})
        for rank, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(rank, connection), daemon=True, name="rank-watch").start()

    def fails(self, error: BaseException) -> None:
        """Tell the other ranks why this one is about to end."""
        self._tell({"rank": self._rank, "cause": f"{type(error).__name__}: {one_line(error)}"})

    def is_over(self) -> None:
        """Tell the other ranks that this one ends in order, and stop watching."""
        self._has_over.add(self._rank)
        self._tell({"rank": self._rank, "over": True})

    def _tell(self, message: dict[str, Any], besides: int | None = None) -> None:
        for rank in self._connections:
            if rank != besides:
                self._send(rank, message)

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        try:
            self._connections[rank].sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            log.debug(f"rank {rank} has gone", exc_info=error)  # which its listener notices

    def _listen(self, rank: int, connection: socket.socket) -> None:
        for message in _messages(connection):
            about = int(message["rank"])
            if "over" in message:
                self._has_over.add(about)
            elif "gone" in message:
                self._causes.setdefault(about, message["gone"])
                self._end_after(about)
            else:
                self._causes.setdefault(about, message["cause"])
            if self._rank == 0:
                self._tell(message, besides=about)  # the others have a connection to this rank only
        self._end_after(rank)

    def _end_after(self, rank: int) -> None:
        """End this process, because another rank has; unless one of them is over."""
        if self._gone is not None or self._has_over & {self._rank, rank}:
            return
        self._gone = rank
        cause = self._causes.get(rank, "it was killed")
        if self._rank == 0:
            self._tell({"rank": rank, "gone": cause}, besides=rank)
        log.error(f"rank {rank} has ended ({cause}), so rank {self._rank} ends too")
        time.sleep(self._grace)
        if self._rank not in self._has_over:
            os._exit(1)


def _server() -> socket.socket:
    """A socket at the address that the ranks find the first one at."""
    try:
        return socket.create_server((os.environ.get("MASTER_ADDR", "localhost"), 0))
    except OSError as error:
        log.debug("MASTER_ADDR is no address of this machine", exc_info=error)
        return socket.create_server(("", 0))


def _accept(server: socket.socket, count: int, token: str) -> dict[int, socket.socket]:
    """The connections of the other ranks, which know the token."""
    found: dict[int, socket.socket] = {}
    server.settimeout(SECONDS_TO_CONNECT)
    with server:
        while len(found) < count:
            connection, _ = server.accept()
            connection.settimeout(SECONDS_TO_CONNECT)
            hello = _hello(connection)
            if hello.get("token") == token:
                connection.settimeout(None)
                found[int(hello["rank"])] = connection
            else:
                connection.close()
    return found


def _hello(connection: socket.socket) -> dict[str, Any]:
    """The first line of a connection, read byte by byte: what follows it belongs to the listener."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 200:
        byte = connection.recv(1)
        if not byte:
            return {}
        line += byte
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """The messages of a connection until it is closed."""
    try:
        with connection.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    except OSError as error:
        log.debug("a connection to a rank broke", exc_info=error)
