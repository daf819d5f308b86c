"""A model on two ranks behind one address: the answers of one process; a lost rank ends all of them."""

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import peft
import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.errors import LostRankError
from tests.helpers.loopback import asking, png, serving

LAYOUTS = {"TP2": {"tensor_model_parallel_size": 2}, "PP2": {"pipeline_model_parallel_size": 2}}
DRAWN = {"temperature": 1.2, "seed": 3, "n": 2, "top_p": 0.9}
CASES = [
    {"messages": asking("What is it?", png(30, 20)), "max_tokens": 7, "temperature": 0},
    {"messages": asking("More of it"), "max_tokens": 12, **DRAWN},
    {"messages": asking("Both?", png(20, 50), png(30, 20)), "max_tokens": 5, "num_beams": 2, "temperature": 0},
    {"messages": asking("None"), "max_tokens": 5, "temperature": -1},
]


@pytest.fixture(scope="module")
def adapter(golden, tmp_path_factory):
    path = golden / "models" / "llava_hf"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("ranks") / "adapter"
    wrapped.save_pretrained(folder)
    return folder


def served(path, adapter, layout):
    """On every rank: the answers that rank 0 gives to all cases of both models at once; None on the others."""
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.ranks import follow, joined_lanes
    from mindspeed_mm.serving.service import ChatService

    vlm = mm.load(path, device="cpu", **layout)
    lanes, channel = joined_lanes(vlm, "base", lambda: vlm.engine(batch_size=3), {"tuned": adapter})
    if channel is not None and not channel.first:
        return follow(lanes, channel)
    with serving(ChatService(lanes, ServingLimits(batch_size=3), channel)) as server, ThreadPoolExecutor(8) as pool:

        def ask(model, case):
            return httpx.post(f"{server.address}/v1/chat/completions", json={"model": model} | case, timeout=90)

        asked = [(model, case) for case in CASES for model in ("base", "tuned")]
        first = list(pool.map(lambda pair: ask(*pair), asked))
        reloaded = httpx.post(f"{server.address}/v1/models/tuned/reload", json={}, timeout=60).json()
        assert reloaded == {"id": "tuned", "status": "reloaded"}
        texts = [[found["message"]["content"] for found in answer.json().get("choices", [])] for answer in first]
        return texts, [answer.status_code for answer in first], ask("tuned", CASES[0]).json()["choices"][0]["message"]


@pytest.fixture(scope="module")
def alone(golden, adapter):
    """What one process answers."""
    return served(golden / "models" / "llava_hf", adapter, {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_answer_as_one_process(ranks, golden, adapter, alone, layout):
    path = golden / "models" / "llava_hf"
    first, second = ranks(2).run(served, path, adapter, LAYOUTS[layout])
    assert first == alone and second is None
    texts, codes, again = alone
    assert codes == [200] * 6 + [400] * 2 and texts[0] != texts[1] and again["content"] == texts[1][0]


class BrokenChannel:
    """To a rank that is lost."""

    def tell(self, orders, *, step):
        raise RuntimeError("Connection closed by peer\nat some place")


@pytest.mark.parametrize("asked", [True, False], ids=["a request", "no request"])
def test_letter_j_a_lost_rank_ends_the_first_one(golden, asked):
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.ranks import joined_lanes
    from mindspeed_mm.serving.service import ChatService

    vlm = mm.load(golden / "models" / "llava_hf", device="cpu")
    lanes, _ = joined_lanes(vlm, "base", vlm.engine, {})
    service, told = ChatService(lanes, ServingLimits(), BrokenChannel()), threading.Event()
    service.thread.on_failure = told.set
    with serving(service) as server:
        if asked:
            answer = httpx.post(f"{server.address}/v1/chat/completions", json={"model": "base"} | CASES[0], timeout=60)
            assert answer.status_code == 500 and answer.json()["error"]["message"] == "the engine has stopped"
        assert told.wait(60) and httpx.get(f"{server.address}/health").status_code == 503
    assert isinstance(service.thread.failure, LostRankError)
    assert "a rank is lost or a step failed (Connection closed by peer): start all" in str(service.thread.failure)


class EndingChannel:
    """To a rank that is lost while there is nothing to do."""

    def tell(self, orders, *, step):
        pass

    def end(self):
        raise RuntimeError("Connection closed by peer")


def test_letter_k_a_rank_that_was_lost_is_told_when_the_first_one_is_stopped(golden):
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.ranks import joined_lanes
    from mindspeed_mm.serving.service import ChatService

    vlm = mm.load(golden / "models" / "llava_hf", device="cpu")
    service = ChatService(joined_lanes(vlm, "base", vlm.engine, {})[0], ServingLimits(), EndingChannel())
    with serving(service):
        pass
    assert isinstance(service.thread.failure, LostRankError)
    assert "a rank is lost or a step failed (Connection closed by peer)" in str(service.thread.failure)


def lost_while_following(path, layout):
    """What `follow` raises on rank 1 when a step fails."""
    from mindspeed_mm.serving.ranks import follow, joined_lanes

    vlm = mm.load(path, device="cpu", **layout)
    lanes, channel = joined_lanes(vlm, "base", vlm.engine, {})
    if channel.first:
        return channel.tell([], step=True)
    lanes.step = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(LostRankError, match="a rank is lost or a step failed .out of memory.: start all ranks"):
        follow(lanes, channel)


def test_a_follower_ends_with_an_error(ranks, golden):
    ranks(2).run(lost_while_following, golden / "models" / "llava_hf", LAYOUTS["TP2"])


@pytest.mark.slow
def test_the_launch_ends_when_a_rank_is_killed(golden):
    words = ["serve", "--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--port", "0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [*launch, "-m", "mindspeed_mm", *words, "--tensor-model-parallel-size", "2"]
    run = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        address = next(found[1] for text in run.stderr if (found := re.search(r"serving on (http://\S+)", text)))
        answer = httpx.post(f"{address}/v1/chat/completions", json={"model": "llava_hf"} | CASES[0], timeout=60)
        assert answer.status_code == 200
        ranks = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True).stdout
        os.kill(int(ranks.split()[-1]), signal.SIGKILL)
        assert run.wait(120) != 0
    finally:
        run.kill()
        run.stderr.close()
