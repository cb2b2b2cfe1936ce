"""A server's life: from its port to the last answer that it lets end."""

import asyncio
import contextlib
import signal
import socket
import sys
from ipaddress import ip_address
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from dpalign.dial.server.answering import Service
    from dpalign.dial.server.guard import Guard


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before the model is loaded: a port in use is known at once.

    Raises:
        ValueError: it cannot be bound.
    """
    listening = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ValueError(f"cannot listen at {host}, port {port}: {error.strerror}; choose another --port") from None
    return listening


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(guard: "Guard", service: "Service", listening: socket.socket, *, access_log: bool = False) -> None:
    """Serve on a listening socket until SIGINT or SIGTERM, and let running answers end within the grace time."""
    config = uvicorn.Config(
        guard,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        server_header=False,
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(service.limits.grace) + 5,
    )
    server = server_of(config, guard, service)

    def stop(*_: object) -> None:
        server.should_exit = True

    # until uvicorn listens to them, and when it raises them again at its end
    for told in (signal.SIGINT, signal.SIGTERM):
        signal.signal(told, stop)
    server.run(sockets=[listening])


def server_of(config: uvicorn.Config, guard: "Guard", service: "Service") -> uvicorn.Server:
    """A server that says where it answers, takes no new requests once it is told to stop, and then ends what is running
    after the grace time."""

    class GracefulServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for listening in sockets or []:
                host, port = listening.getsockname()[:2]
                sys.stdout.write(f"{service.name} at http://{f'[{host}]' if ':' in host else host}:{port}\n")
                sys.stdout.flush()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            guard.closing = True
            ending = asyncio.create_task(end_after_grace())
            try:
                await super().shutdown(sockets)
            finally:
                ending.cancel()

    async def end_after_grace() -> None:
        await asyncio.sleep(service.limits.grace)
        with contextlib.suppress(Exception):
            await service.generator.close()

    return GracefulServer(config)
