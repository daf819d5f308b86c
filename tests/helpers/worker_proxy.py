"""A worker's connections through the hands of a test, which can cut them as the end of the process would."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from urllib.parse import urlsplit


class CuttingProxy:
    """Passes connections on to an address. `cut` ends all of them at once and refuses new ones; `mend` takes them."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._target = (parts.hostname, parts.port)
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()
        self._port = 0
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.mend()
        self.address = f"http://127.0.0.1:{self._port}"

    def mend(self) -> None:
        """Take connections at the address of before."""
        self._run(self._listen())

    def cut(self) -> None:
        """End all connections, without a word to either side."""
        self._run(self._drop())

    def close(self) -> None:
        """The end of the proxy."""
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def _run(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _drop(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(*self._target)
        pairs = [asyncio.create_task(self._pump(*ends)) for ends in ((reader, to_writer), (to_reader, writer))]
        self._tasks.update(pairs)
        await asyncio.wait(pairs)
        self._tasks.difference_update(pairs)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        self._writers.discard(writer)
        writer.close()
