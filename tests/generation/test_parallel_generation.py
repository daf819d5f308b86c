"""The same tokens on two tensor-parallel ranks, two pipeline stages, and one process."""

import pytest

LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2)}
REQUESTS = [
    {"input_ids": [[1, *range(300, 330)], [1, *[-200] * 16, 400, 401, 402]], "max_new_tokens": 10},
    {"input_ids": [[1, *range(300, 330)]], "max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2},
    {"input_ids": [[1, 5, 9]], "max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
]


def tokens(golden, tensor: int, pipeline: int):
    """What this rank generates for each request."""
    import torch

    import mindspeed_mm as mm

    vlm = mm.load(
        golden / "models" / "llava_hf",
        device="cpu",
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
    )
    torch.manual_seed(0)
    image = torch.randn(1, 3, 56, 56)
    found = [vlm.generate(images=image if index == 0 else None, **request) for index, request in enumerate(REQUESTS)]
    return [*found, vlm.generate("What is it?", max_new_tokens=6), shared_beginnings(vlm)]


def shared_beginnings(vlm):
    """Tokens of requests that begin alike and come one after the other, and how much each took from another one."""
    from PIL import Image

    from mindspeed_mm.generation.engine import GenerationRequest

    engine, shown = vlm.engine(batch_size=2), Image.new("RGB", (30, 20), (200, 30, 90))
    texts = ("What is it?", "What is it, and where?", "Why?", "What is it?")
    requests = [GenerationRequest(text, turns=((text, None),), images=(shown,)) for text in texts]
    results = list(engine.generate(requests, {"max_new_tokens": 5}, 2))
    assert all(result.cached_tokens > 16 for result in results[1:])
    return [(result.token_ids, result.cached_tokens) for result in results]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_generate_what_one_process_does(ranks, golden, layout):
    tensor, pipeline = LAYOUTS[layout]
    single = ranks(1).run(tokens, golden, 1, 1)[0]
    assert ranks(2).run(tokens, golden, tensor, pipeline) == [single, single]
