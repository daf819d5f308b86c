"""Connections that are kept: who gives one up first, and what happens to a request on one that closes."""

import socket
import threading

import httpx
import openai
import pytest
from fastapi import FastAPI

from mindspeed_mm.serving import controller, open_loop, server
from mindspeed_mm.serving.controller import ChatController, make_controller_app
from mindspeed_mm.serving.heartbeat import WorkerHeartbeat
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.worker_pool import WorkerPool
from tests.helpers.loopback import app_on_loopback

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class ImpatientWorker(threading.Thread):
    """Answers the first request of a connection. On the next one it closes, as a server does whose time for idle
    connections is over while the request is on its way."""

    def __init__(self, answers: int = 1) -> None:
        super().__init__(daemon=True)
        self._answers, self.connections = answers, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            with connection, connection.makefile("rb") as lines:
                for number in range(self._answers + 1):
                    length = 0
                    while (line := lines.readline().strip()) != b"":
                        if line.lower().startswith(b"content-length:"):
                            length = int(line.split(b":")[1])
                    lines.read(length)
                    if number < self._answers:
                        connection.sendall(ANSWER)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


def ask_twice(worker):
    """The statuses of two requests to a controller with this worker, and its health."""
    chat = ChatController(WorkerPool(), ServingLimits())
    with (
        app_on_loopback(make_controller_app(chat)) as front,
        httpx.Client(base_url=front.address, timeout=60) as client,
    ):
        assert WorkerHeartbeat(front.address, worker.address, ["tiny"], 1).beat()
        codes = [client.post("/v1/chat/completions", json=BODY).status_code for _ in range(2)]
        return codes, client.get("/health").status_code


def test_a_connection_that_closes_as_it_is_used_again_loses_no_worker():
    worker = ImpatientWorker()
    try:
        assert ask_twice(worker) == ([200, 200], 200) and worker.connections == 2
    finally:
        worker.close()


def test_a_worker_that_closes_new_connections_too_is_lost():
    worker = ImpatientWorker(answers=0)
    try:
        assert ask_twice(worker) == ([503, 503], 503) and worker.connections == 2
    finally:
        worker.close()


@pytest.mark.parametrize(
    "kept",
    [
        controller.KEPT_SECONDS,
        open_loop.KEPT_SECONDS,
        httpx.Limits().keepalive_expiry,
        openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry,
    ],
)
def test_clients_give_a_connection_up_before_the_server_does(kept):
    with server.listen("127.0.0.1", 0) as listening:
        found = server.AddressServer(FastAPI(), listening, shutdown_seconds=1).config.timeout_keep_alive
    assert kept + 10 < found == server.IDLE_SECONDS
