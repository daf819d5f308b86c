"""What happens to requests in flight: full queues, clients that leave, time-outs, failed steps, the end."""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import mindspeed_mm as mm
from tests.helpers.loopback import SteppedEngine, serving

GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
LONG = GOOD | {"max_tokens": 60, "min_new_tokens": 60, "stream": True}


@pytest.fixture(scope="module")
def vlm(golden):
    return mm.load(golden / "models" / "llava_hf", device="cpu")


@contextlib.contextmanager
def running(make_engine, **limits):
    """(server, client) of engines that `make_engine` makes."""
    from mindspeed_mm.serving.lanes import ModelLanes
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.service import ChatService

    with serving(ChatService(ModelLanes("tiny", make_engine), ServingLimits(batch_size=1, **limits))) as server:
        with httpx.Client(base_url=server.address, timeout=60) as client:
            yield server, client


@contextlib.contextmanager
def stepped(vlm, **limits):
    """(engines, server, client); no step is taken before it is permitted."""
    engines = SteppedEngine(vlm)
    with running(engines.make, **limits) as (server, client):
        try:
            yield engines, server, client
        finally:
            engines.run()


def ask(client, body, **more):
    return client.post("/v1/chat/completions", json=body, **more)


def wait_for(client, in_flight):
    """Ask until so many requests are in flight."""
    for _ in range(10_000):
        if client.get("/health").json()["in_flight"] == in_flight:
            return
    raise AssertionError(f"there are never {in_flight} requests in flight")


def refused(response, status, message):
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"], error
    return error


def test_a_full_queue_says_when_to_ask_again(vlm):
    with stepped(vlm, queue=1) as (engines, _, client), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, client, GOOD) for _ in range(2)]
        wait_for(client, 2)
        response = ask(client, GOOD)
        assert refused(response, 429, "2 requests wait or run, which is all")["code"] == "queue_full"
        assert response.headers["Retry-After"] == "1"
        engines.run()
        assert [each.result().status_code for each in waiting] == [200, 200]
        wait_for(client, 0)
        assert ask(client, GOOD).status_code == 200


def test_a_client_that_leaves_a_stream_ends_its_request(vlm):
    with stepped(vlm) as (engines, _, client):
        engines.permits.release(10)
        with client.stream("POST", "/v1/chat/completions", json=LONG) as response:
            next(response.iter_lines())
        wait_for(client, 0)
        engines.permits.release(1)  # a step that drops it
        engines.run()
        assert ask(client, GOOD).status_code == 200
        assert not engines.engines[0].busy
        assert 'requests_total{status="client_gone"} 1' in client.get("/metrics").text


def test_a_client_that_does_not_wait_ends_its_request(vlm):
    with stepped(vlm) as (engines, _, client):
        with pytest.raises(httpx.ReadTimeout):
            ask(client, GOOD, timeout=0.1)
        wait_for(client, 0)
        engines.run()
        assert ask(client, GOOD).status_code == 200
        assert 'requests_total{status="client_gone"} 1' in client.get("/metrics").text


def test_time_is_limited(vlm):
    with stepped(vlm, seconds=0.05) as (_, _, client):
        assert refused(ask(client, GOOD), 504, "no answer within 0.05 seconds")["code"] == "timeout"
        wait_for(client, 0)


def test_an_answer_that_takes_too_long_ends_its_stream_with_an_error(vlm):
    with stepped(vlm, seconds=0.5) as (engines, _, client):
        engines.permits.release(10)
        with client.stream("POST", "/v1/chat/completions", json=LONG) as response:
            lines = [line for line in response.iter_lines() if line]
        assert response.status_code == 200 and "no answer within 0.5 seconds" in lines[-1]


def test_a_failed_step_costs_its_requests_alone(vlm):
    engines = []

    def fail():
        raise RuntimeError("out of memory")

    def make_engine():
        engine = vlm.engine(batch_size=1)
        if not engines:
            engine.step = fail
        engines.append(engine)
        return engine

    with running(make_engine) as (_, client):
        assert refused(ask(client, GOOD), 500, "the engine failed")["type"] == "server_error"
        assert ask(client, GOOD).status_code == 200 and len(engines) == 2


def test_an_engine_that_has_stopped_is_told(vlm, monkeypatch):
    def fail():
        raise KeyError("a fault of ours")

    def make_engine():
        engine = vlm.engine()
        engine.step = fail
        return engine

    seen = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: seen.set())
    with running(make_engine) as (_, client):
        refused(ask(client, GOOD), 500, "the engine has stopped")
        assert seen.wait(60)
        refused(client.get("/health"), 503, "the engine has stopped")
        assert ask(client, GOOD).headers["Retry-After"] == "5"


def test_requests_in_flight_are_answered_before_the_end(vlm):
    with stepped(vlm) as (engines, server, client):
        engines.permits.release(10)
        with client.stream("POST", "/v1/chat/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            server.should_exit = True
            engines.run()
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_what_is_given_up_at_the_end_is_told_in_form(vlm):
    """Behind the limit for requests in flight: a whole answer gets its status, a stream its event."""
    from mindspeed_mm.serving.app import make_app
    from mindspeed_mm.serving.lanes import ModelLanes
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.server import AddressServer, listen
    from mindspeed_mm.serving.service import ChatService

    engines = SteppedEngine(vlm, batch_size=2)
    service = ChatService(ModelLanes("tiny", engines.make), ServingLimits(batch_size=2))
    with listen("127.0.0.1", 0) as listening, ThreadPoolExecutor(2) as pool:
        server = AddressServer(make_app(service), listening, shutdown_seconds=1)
        running = pool.submit(server.serve_until_told)
        assert server.ready.wait(60)
        with httpx.Client(base_url=server.address, timeout=60) as client:
            engines.permits.release(10)
            with client.stream("POST", "/v1/chat/completions", json=LONG) as response:
                lines = response.iter_lines()
                next(lines)
                whole = pool.submit(ask, client, LONG | {"stream": False})
                wait_for(client, 2)
                server.end()
                error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
            answer = whole.result(60)  # before the client closes, which would cut it off
        engines.run()
        assert error["code"] == "ending" and error["message"] == "the server is ending: ask again later"
        assert refused(answer, 503, "the server is ending")["code"] == "ending"
        assert answer.headers["Retry-After"] == "5"
        running.result(60)
