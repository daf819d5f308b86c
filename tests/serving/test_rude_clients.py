"""Many clients at once, some of them rude, and a worker that is lost and comes back: right answers, errors in form,
nothing left behind. The slow test has processes and the numbers of docs/serving.md."""

import contextlib
import gc
import threading
from functools import partial

import httpx
import pytest

import mindspeed_mm as mm
from benchmarks.rude_clients import RudeClients, ServingProcesses
from mindspeed_mm.serving import heartbeat, worker_pool
from mindspeed_mm.serving.controller import ChatController, make_controller_app
from mindspeed_mm.serving.limits import ServingLimits
from tests.helpers.loopback import app_on_loopback, asking, png, serving
from tests.helpers.worker_proxy import CuttingProxy

IMAGES = [png(30, 20), png(20, 50, (9, 99, 200))]
QUESTIONS = [("What is it?", 1), ("And these two?", 2), ("No image at all", 0), ("More of it", 1), ("Tell me", 0)]


@pytest.fixture
def path(golden):
    return golden / "models" / "llava_hf"


@pytest.fixture
def vlm(path):
    return mm.load(path, device="cpu")


def questions(vlm, new_tokens):
    """Bodies, and the texts that answer them."""
    from mindspeed_mm.data.sample import ImageBytes

    bodies = [
        {"model": "tiny", "messages": asking(text, *IMAGES[:count]), "max_tokens": new_tokens, "temperature": 0}
        for text, count in QUESTIONS
    ]
    images = [ImageBytes("image", data) for data in IMAGES]
    texts = [vlm.generate(text, images[:count], max_new_tokens=new_tokens)[0] for text, count in QUESTIONS]
    return bodies, texts


def test_a_worker_is_lost_and_returns_under_load(path, vlm, monkeypatch):
    from mindspeed_mm.serving.lanes import ModelLanes
    from mindspeed_mm.serving.service import ChatService

    monkeypatch.setattr(worker_pool, "LOST_AFTER", 600)  # a worker is lost by a connection that breaks
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.2)
    asked, wanted = questions(vlm, 6)
    before = request_parts()
    limits = ServingLimits(batch_size=4, queue=3)  # so that some are refused for a while
    controller = ChatController(worker_pool.WorkerPool(), limits)
    models = [vlm, mm.load(path, device="cpu")]  # a model belongs to one thread
    services = [ChatService(ModelLanes("tiny", partial(one.engine, batch_size=4)), limits) for one in models]
    with contextlib.ExitStack() as stack:
        front = stack.enter_context(app_on_loopback(make_controller_app(controller)))
        workers = [stack.enter_context(serving(service)).address for service in services]
        proxy = CuttingProxy(workers[1])
        stack.callback(proxy.close)

        cut = threading.Event()

        def lose():
            cut.set()
            proxy.cut()

        def come_back():
            proxy.mend()
            cut.clear()

        # On a busy machine a connection to the other worker may fail too, and only its next heartbeat brings it back.
        for address, alive in ((workers[0], lambda: True), (proxy.address, lambda: not cut.is_set())):
            stack.enter_context(beating(front.address, address, alive))
        until_there(front.address, 2)
        course = RudeClients(front.address, asked, wanted, clients=24, requests=300)
        course.run({1 / 3: lose, 2 / 3: come_back})
        assert not course.faults, course.faults[:3]
        assert course.ended == 300 and course.kinds["answered"] > 200
        assert course.kinds["malformed"] and course.kinds["left"]
        until_there(front.address, 2)
        # Requests whose clients left end at the worker first; the controller closes its side a moment later.
        while any(service.in_flight for service in services) or any(one.in_flight for one in controller.pool.workers()):
            httpx.get(f"{front.address}/health")
    left = [found for found in request_parts() if not any(found is one for one in before)]
    assert not left, left[:3]


@contextlib.contextmanager
def beating(controller, address, alive):
    """A worker's heartbeats while it is alive."""
    beats, ready = heartbeat.WorkerHeartbeat(controller, address, ["tiny"], 4), threading.Event()
    ready.set()
    thread = threading.Thread(target=beats.run, args=(alive, ready))
    thread.start()
    try:
        yield
    finally:
        beats.close()
        thread.join()


def until_there(controller, workers):
    """Wait for so many workers."""
    while httpx.get(f"{controller}/health").json().get("workers") != workers:
        pass


def request_parts():
    """What the requests of servers are made of, if anything holds it still."""
    from mindspeed_mm.generation.engine import GenerationHandle
    from mindspeed_mm.serving.engine_thread import RunningRequest
    from mindspeed_mm.serving.relay import RequestRelay
    from mindspeed_mm.serving.service import Exchange

    gc.collect()
    kinds = (GenerationHandle, RunningRequest, RequestRelay, Exchange)
    return [found for found in gc.get_objects() if isinstance(found, kinds)]


@pytest.mark.slow
def test_load_of_two_hundred_clients(path, vlm):
    asked, wanted = questions(vlm, 8)
    words = ["--model", str(path), "--served-model-name", "tiny", "--device", "cpu", "--queue", "200"]
    memory = []
    with contextlib.ExitStack() as stack:
        processes = ServingProcesses(stack, *words)
        for requests in (2000, 500, 500):  # of the same questions: what caches hold is there after the first time
            course = RudeClients(processes.controller.address, asked, wanted, clients=200, requests=requests)
            course.run({1 / 3: processes.kill, 2 / 3: processes.start_again})
            processes.until_there(2)
            assert not course.faults, course.faults[:3]
            assert course.ended == requests
            assert min(course.kinds["malformed"], course.kinds["left"]) > requests / 50
            memory.append(processes.memory())
    for name in memory[0]:
        grown = memory[2][name] - memory[1][name]
        assert grown < 8, f"{name} grew by {grown} MiB in the third round: {memory}"
