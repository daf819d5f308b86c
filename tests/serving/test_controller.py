"""A controller in front of workers, over real servers on loopback; the workers' answers are the test's."""

import contextlib
import gc
import http.client
import json
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from mindspeed_mm.serving.controller import ChatController, make_controller_app
from mindspeed_mm.serving.heartbeat import WorkerHeartbeat
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.worker_pool import WorkerPool
from tests.helpers.loopback import app_on_loopback

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
PIECES = ('data: {"piece": 1}\n\n', 'data: {"piece": 2}\n\n', "data: [DONE]\n\n")


class FakeWorker:
    """Answers with its name, or as the test says."""

    def __init__(self, name: str) -> None:
        self.name, self.asked, self.status, self.breaks_after = name, [], 200, None
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/v1/models/{name:path}/reload")(self.reload)
        self.reloaded, self.problem = [], None

    async def chat(self, request: Request):
        body = await request.json()
        self.asked.append((body, request.headers.get("authorization")))
        if body.get("stream"):
            return StreamingResponse(self.pieces(), media_type="text/event-stream")
        if self.breaks_after is not None:
            return StreamingResponse(self.pieces(), media_type="application/json")
        return JSONResponse({"from": self.name}, self.status, headers={"Retry-After": "7"})

    async def reload(self, name: str, request: Request):
        self.reloaded.append((name, await request.json()))
        error = {"message": self.problem, "code": "adapter_not_read", "param": None, "type": "t"}
        return JSONResponse({}) if self.problem is None else JSONResponse({"error": error}, 400)

    async def pieces(self):
        for index, piece in enumerate(PIECES):
            if index == self.breaks_after:
                yield piece[:9]
                raise ConnectionError("the worker of the test breaks")
            yield piece


class Cluster:
    """A controller and its fake workers."""

    def __init__(self, stack: contextlib.ExitStack, worker_token=None, **options) -> None:
        self._stack, self.worker_token = stack, worker_token
        self.controller = ChatController(WorkerPool(), ServingLimits(body_bytes=2000), worker_token)
        self.server = stack.enter_context(app_on_loopback(make_controller_app(self.controller, **options)))
        self.client = stack.enter_context(httpx.Client(base_url=self.server.address, timeout=60))

    def beat(self, address, models=("tiny",), capacity=1):
        return WorkerHeartbeat(self.server.address, address, models, capacity, self.worker_token).beat()

    def worker(self, name, models=("tiny",)):
        worker = FakeWorker(name)
        worker.address = self._stack.enter_context(app_on_loopback(worker.app)).address
        assert self.beat(worker.address, models)
        return worker

    def ask(self, **more):
        return self.client.post("/v1/chat/completions", json=BODY | more)


@pytest.fixture
def cluster():
    with contextlib.ExitStack() as stack:
        yield Cluster(stack)


def dead_address():
    from mindspeed_mm.serving.server import listen

    with listen("127.0.0.1", 0) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_several_models_behind_one_address(cluster):
    cluster.worker("a", ["tiny", "both"])
    cluster.worker("b", ["other", "both"])
    assert [model["id"] for model in cluster.client.get("/v1/models").json()["data"]] == ["both", "other", "tiny"]
    assert cluster.client.get("/v1/models/other").json()["id"] == "other"
    assert cluster.ask(model="other").json() == {"from": "b"} and cluster.ask().json() == {"from": "a"}
    assert {cluster.ask(model="both").json()["from"] for _ in range(2)} == {"a", "b"}
    missing = cluster.ask(model="none")
    assert missing.status_code == 404 and missing.json()["error"]["param"] == "model"
    assert cluster.client.get("/v1/models/none").status_code == 404
    health = cluster.client.get("/health").json()
    assert health == {"status": "ok", "workers": 2, "models": ["both", "other", "tiny"], "in_flight": 0}
    text = cluster.client.get("/metrics").text
    assert 'controller_requests_total{status="200"} 4.0' in text and "controller_workers 2.0" in text


def test_an_adapter_is_read_again_by_all_workers_of_its_name(cluster):
    first, second, other = (cluster.worker(name, [model]) for name, model in [("a", "m/x"), ("b", "m/x"), ("c", "z")])
    assert cluster.beat(dead_address(), ["m/x", "gone"])

    def reload(name, **more):
        return cluster.client.post(f"/v1/models/{name}/reload", **({"json": {}} | more))

    assert reload("m/x").json() == {"id": "m/x", "status": "reloaded", "workers": 2, "lost": 1}
    assert first.reloaded == second.reloaded == [("m/x", {})] and not other.reloaded
    second.problem = "no adapter_config.json"
    refused = reload("m/x")
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "adapter_not_read"
    assert (
        "1 of 2 workers did not read the adapter 'm/x' again: no adapter_config" in refused.json()["error"]["message"]
    )
    assert reload("none").status_code == 404 and reload("gone").status_code == 503
    assert reload("m/x", json=None, content=b"{}").status_code == 415
    other.app.router.routes.pop()  # something that is no worker of ours
    assert "the answer was 404" in reload("z").json()["error"]["message"]


def test_streams_pass_through(cluster):
    worker = cluster.worker("a")
    answer = cluster.ask(stream=True, seed=3)
    assert answer.text == "".join(PIECES) and answer.headers["content-type"].startswith("text/event-stream")
    assert worker.asked == [(BODY | {"stream": True, "seed": 3}, None)]
    assert cluster.client.get("/health").json()["in_flight"] == 0


def test_a_worker_that_cannot_be_reached_is_passed_over(cluster):
    address = dead_address()
    assert cluster.beat(address)
    worker = cluster.worker("a")
    assert [cluster.ask().json() for _ in range(2)] == [{"from": "a"}] * 2 and len(worker.asked) == 2
    assert cluster.client.get("/health").json()["workers"] == 1
    assert cluster.beat(address) and cluster.client.get("/health").json()["workers"] == 2


@pytest.mark.parametrize("stream", [True, False])
def test_what_was_relayed_is_free_at_once(cluster, stream):
    """No circle of references keeps a request's images until the garbage collector comes to it."""
    worker = cluster.worker("a")
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            assert cluster.ask(stream=stream).status_code == 200
        held = [found for found in gc.get_objects() if isinstance(found, httpx.Request)]
        assert not [found for found in held if str(found.url).startswith(worker.address)]
    finally:
        gc.enable()


def test_no_worker_is_left(cluster):
    assert cluster.client.get("/health").status_code == 503
    assert cluster.beat(dead_address())
    answer = cluster.ask()
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "worker_lost"
    assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize(("stream", "after"), [(True, 0), (False, 1)])
def test_a_worker_lost_before_the_first_byte(cluster, stream, after):
    first = cluster.worker("a")
    first.breaks_after = after
    second = cluster.worker("b")
    answer = cluster.ask(stream=stream)
    assert answer.text == "".join(PIECES) if stream else answer.json() == {"from": "b"}
    assert len(first.asked) == len(second.asked) == 1


def test_a_worker_lost_in_the_middle_of_a_stream(cluster):
    first, second = cluster.worker("a"), cluster.worker("b")
    first.breaks_after = 1
    events = cluster.ask(stream=True).text.split("\n\n")
    assert events[0] + "\n\n" == PIECES[0] and len(events) == 3 and events[2] == ""
    error = json.loads(events[1].removeprefix("data: "))["error"]
    assert error["code"] == "worker_lost" and "lost in the middle" in error["message"]
    assert not second.asked and cluster.client.get("/health").json()["workers"] == 1


def test_busy_workers(cluster):
    first, second = cluster.worker("a"), cluster.worker("b")
    first.status = 429
    assert cluster.ask().json() == {"from": "b"}
    second.status = 503
    answer = cluster.ask()
    assert answer.status_code in (429, 503) and answer.headers["retry-after"] == "7"


def test_what_is_the_requests_fault_is_asked_once(cluster):
    workers = [cluster.worker("a"), cluster.worker("b")]
    for worker in workers:
        worker.status = 400
    assert cluster.ask().status_code == 400 and sum(len(worker.asked) for worker in workers) == 1


def test_requests_that_are_refused(cluster):
    cluster.worker("a")
    assert cluster.client.post("/v1/chat/completions", content=b"{").status_code == 415
    answer = cluster.ask(model=3)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "model"
    assert cluster.ask(messages="x" * 3000).status_code == 413
    wrong = cluster.client.post("/workers", json={"address": "http://a:1", "models": [], "capacity": 0})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "models"
    assert cluster.client.get("/health", headers={"Host": "example.org"}).status_code == 403


def test_a_request_that_does_not_come_whole():
    controller = ChatController(WorkerPool(), ServingLimits(seconds=0.1))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with app_on_loopback(make_controller_app(controller)) as server:
        port = int(server.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            error = json.loads(answer.read())["error"]
    assert answer.status == 504 and error["code"] == "timeout"
    assert error["message"] == "the request was not whole within 0.1 seconds"


def test_tokens(caplog):
    with contextlib.ExitStack() as stack:
        cluster = Cluster(stack, worker_token="shared", token="clients")
        worker = cluster.worker("a")
        assert cluster.ask().status_code == 401
        cluster.client.headers["Authorization"] = "Bearer clients"
        assert cluster.ask().json() == {"from": "a"}
        assert worker.asked[0][1] == "Bearer shared"  # the clients' token stays with the controller
        stranger = WorkerHeartbeat(cluster.server.address, "http://127.0.0.1:1", ["tiny"], 1, "wrong")
        assert not stranger.beat() and "does not take this worker: 401" in caplog.text
        assert len(cluster.controller.pool.workers()) == 1


def test_a_heartbeat_without_a_controller_goes_on(caplog):
    beat = WorkerHeartbeat(dead_address(), "http://127.0.0.1:1", ["tiny"], 1)
    assert not beat.beat() and not beat.beat()
    assert caplog.text.count("does not take this worker") == 1


def test_a_controller_does_without_torch():
    code = "import sys, mindspeed_mm.serving.controller, mindspeed_mm.cli.serve; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_real_worker(cluster, golden):
    import mindspeed_mm as mm
    from mindspeed_mm.cli.flags.workers import registered
    from mindspeed_mm.serving.lanes import ModelLanes
    from mindspeed_mm.serving.service import ChatService
    from tests.helpers.loopback import asking, png, serving

    vlm = mm.load(golden / "models" / "llava_hf", device="cpu")
    service = ChatService(ModelLanes("tiny", lambda: vlm.engine(batch_size=2)), ServingLimits(batch_size=2))
    body = {"messages": asking("What?", png(20, 20)), "max_tokens": 5, "temperature": 0}
    with serving(service) as server:
        heartbeat = WorkerHeartbeat(cluster.server.address, server.address, ["tiny"], 2)
        known, post = threading.Event(), heartbeat._post
        heartbeat._post = lambda path: (post(path), known.set())
        with registered(heartbeat, service.thread, server):
            assert known.wait(60)
            whole = cluster.ask(**body).json()["choices"][0]
            direct = httpx.post(f"{server.address}/v1/chat/completions", json=BODY | body, timeout=60).json()[
                "choices"
            ][0]
            lines = cluster.ask(**body, stream=True).text.split("\n\n")
        assert whole == direct and lines[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        assert (
            "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
        )
        assert cluster.client.get("/health").status_code == 503  # it has left
