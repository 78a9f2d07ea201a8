"""Several processes that train one run: how they find each other, agree, and end together."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from launch.runs import UserError

__all__ = ["agreed", "barrier", "connect", "is_of_jax", "leave", "watching_each_other"]

T = TypeVar("T")

_CONNECT_SECONDS = 300.0  # as long as JAX waits for the other processes
_HEARTBEAT_SECONDS = 20  # without a sign of another process it counts as lost
_HELLO_SECONDS = 5.0
_GOODBYE = b"."


def connect(address: str | None, count: int, index: int) -> None:
    """Joins process ``index`` of ``count`` to the others, which meet at ``address`` (host:port).

    Raises:
      UserError: if a value is wrong, or if the others are not there.
    """
    if count < 1:
        raise UserError(f"num_processes is {count}; it must be at least 1.")
    if not 0 <= index < count:
        raise UserError(f"process_id is {index}; it must be from 0 to num_processes - 1.")
    if count == 1:
        return
    if address is None:
        raise UserError(f"num_processes is {count}, which needs --coordinator_address.")
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"coordinator_address is {address!r}; it must be host:port.")
    if index > 0:
        _wait_for_coordinator(address)
    try:
        jax.distributed.initialize(
            address, count, index, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except RuntimeError as error:
        raise UserError(
            f"coordinator_address is {address!r}; the {count} processes do not find each other "
            f"there ({error})."
        ) from None


def _host_and_port(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)


def _wait_for_coordinator(address: str) -> None:
    """Returns when process 0 listens; JAX would end this process with a core dump if it never did.

    Raises:
      UserError: if it does not within ``_CONNECT_SECONDS``.
    """
    end = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            socket.create_connection(_host_and_port(address), timeout=5).close()
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise UserError(
                    f"coordinator_address is {address!r}; process 0 does not answer ({error})."
                ) from None
            time.sleep(0.2)
        else:
            return


@contextlib.contextmanager
def watching_each_other(address: str | None) -> Iterator[None]:
    """Within it each of several processes ends with a sentence soon after one of them is gone.

    All keep a connection to process 0, which the system closes when a process ends, however it
    ends. A connection begins with numbers that only these processes know, so that no other one
    counts. JAX ends them too, with its own words and a core dump, after a heartbeat was missed or
    when process 0 is gone; mostly this is sooner. Where no connection can be made (a firewall
    between hosts), JAX alone does it.
    """
    if jax.process_count() == 1:
        yield
        return
    assert address is not None
    is_over = threading.Event()
    is_first = jax.process_index() == 0
    connections: list[socket.socket] = []

    def watch(connection: socket.socket) -> None:
        said = b""
        with contextlib.suppress(OSError):  # a reset is an end as well
            said = connection.recv(1)
        if said != _GOODBYE and not is_over.is_set():
            leave(
                "another process has ended or cannot be reached; what the run had saved is there, "
                "and the same command goes on from it"
            )

    def accept(server: socket.socket) -> None:
        with server, contextlib.suppress(OSError):
            while len(connections) < jax.process_count() - 1:
                connection = server.accept()[0]
                connection.settimeout(_HELLO_SECONDS)
                with contextlib.suppress(OSError):
                    if connection.recv(len(hello), socket.MSG_WAITALL) == hello:
                        keep(connection)

    def keep(connection: socket.socket) -> None:
        connection.settimeout(None)
        connections.append(connection)
        _start_thread(watch, connection)

    server = socket.create_server(("", 0)) if is_first else None
    numbers = np.frombuffer(os.urandom(20), np.uint32).copy()
    if server is not None:
        numbers[0] = server.getsockname()[1]
    numbers = np.asarray(multihost_utils.broadcast_one_to_all(numbers))
    hello = numbers[1:].tobytes()
    if server is not None:
        _start_thread(accept, server)
    else:
        with contextlib.suppress(OSError):
            place = _host_and_port(address)[0], int(numbers[0])
            connection = socket.create_connection(place, timeout=_HELLO_SECONDS)
            connection.sendall(hello)
            keep(connection)
    try:
        yield
    finally:
        is_over.set()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(_GOODBYE)


def _start_thread(work: Callable[[socket.socket], None], connection: socket.socket) -> None:
    threading.Thread(target=work, args=(connection,), daemon=True).start()


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(check: Callable[[], T], fingerprint: Callable[[T], str] = lambda result: "") -> T:
    """The result of ``check``, where it raises no ``UserError`` in any process.

    A process that stopped alone would leave the others waiting for it.

    Args:
      check: looks at something, without collectives.
      fingerprint: what must be equal in all processes.
    """
    error, result, code = None, None, 0
    try:
        result = check()
        code = zlib.crc32(fingerprint(result).encode())
    except UserError as raised:
        error = raised
    if jax.process_count() > 1:
        mine = np.array([error is not None, code], np.uint32)
        failed, codes = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2).T
        if error is None and failed.any():
            error = UserError(f"process_id {failed.argmax()} cannot go on; it says why.")
        elif error is None and (codes != codes[0]).any():
            other = (codes != codes[0]).argmax()
            error = UserError(f"config is not the same in process_id 0 and {other}.")
    if error is not None:
        raise error from None
    assert result is not None
    return result


def is_of_jax(error: Exception) -> bool:
    """Whether it comes from devices or from the connection to other processes."""
    # Lost connections are of type ValueError, and begin with a status as the others do. What stops
    # the saving of a checkpoint is the cause of an OSError, and a TimeoutError at a barrier.
    return any(
        isinstance(cause, jax.errors.JaxRuntimeError | TimeoutError)
        or re.match(r"[A-Z]+(_[A-Z]+)*: ", str(cause)) is not None
        for cause in (error, error.__cause__)
    )


def leave(text: str) -> NoReturn:
    """Ends one of several processes at once, for the others may be gone or wait for this one.

    They then find the connection closed, and end in the same way; the regular end of JAX would
    wait for all of them.
    """
    # In one piece, for JAX may be about to end this process.
    sys.stderr.write(f"launch.train: process_id {jax.process_index()}: {text}.\n")
    sys.stderr.flush()
    os._exit(1)
