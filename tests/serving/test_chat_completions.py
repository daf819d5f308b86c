"""The openai client against a server on loopback: the answers are those of mm.load(...).generate."""

import json
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

import mindspeed_mm as mm
from tests.helpers.loopback import asking, data_url, png, serving

RED, WIDE = png(30, 20), png(50, 21, (10, 200, 40))

CASES = [
    {"text": "What is it?", "images": [RED], "temperature": 0, "max_tokens": 9},
    {"text": "And these two?", "images": [WIDE, RED], "temperature": 0, "max_tokens": 14, "logprobs": True},
    {"text": "No image at all", "temperature": 1, "seed": 3, "max_tokens": 12, "logprobs": True, "top_logprobs": 3},
    {"text": "Draw", "images": [WIDE], "temperature": 0.7, "top_p": 0.9, "seed": 5, "n": 3, "max_tokens": 8},
    {"text": "Many words", "temperature": 1.5, "seed": 11, "n": 2, "max_tokens": 30, "extra_body": {"top_k": 20}},
    {
        "text": "Rules of the engine",
        "temperature": 0,
        "max_tokens": 9,
        "extra_body": {"bad_words_ids": [[7]], "sequence_bias": [[[9], 3.0]], "repetition_penalty": 1.2},
    },
    {
        "text": "Biases",
        "temperature": 0,
        "max_tokens": 9,
        "logprobs": True,
        "logit_bias": {"9": 3, "11": -2.5, "2": -100},
    },
    {"text": "Drawn with them", "temperature": 1, "seed": 8, "n": 2, "max_tokens": 9, "logit_bias": {"20": 6.25}},
    {"text": "Its cuts", "temperature": 1, "seed": 2, "max_tokens": 9, "extra_body": {"typical_p": 0.5, "min_p": 0.01}},
    {"text": "Beams", "images": [RED], "n": 2, "max_tokens": 6, "extra_body": {"num_beams": 3}},
]


@pytest.fixture(scope="module")
def vlm(golden):
    return mm.load(golden / "models" / "llava_hf", device="cpu")


@pytest.fixture(scope="module")
def client(vlm):
    from mindspeed_mm.serving.lanes import ModelLanes
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.service import ChatService

    service = ChatService(ModelLanes("tiny", lambda: vlm.engine(batch_size=4)), ServingLimits(batch_size=4))
    with serving(service) as server:
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as found:
            yield found


def engine_answer(vlm, case):
    """The result of the engine alone, and the texts of `generate`."""
    from mindspeed_mm.data.sample import ImageBytes
    from mindspeed_mm.generation.engine import GenerationRequest

    sampling = case.get("temperature", 0) > 0
    options = {"do_sample": sampling, "max_new_tokens": case["max_tokens"], "seed": case.get("seed", 0)}
    options |= {"num_return_sequences": case.get("n", 1)} | case.get("extra_body", {})
    options |= {name: case[name] for name in ("temperature", "top_p") if sampling and name in case}
    if "logit_bias" in case:
        options["sequence_bias"] = [[[int(token)], bias] for token, bias in case["logit_bias"].items()]
    images = [ImageBytes("image", data) for data in case.get("images", ())]
    texts = vlm.generate(case["text"], images, **options)
    if case.get("logprobs"):
        options["logprobs"] = case.get("top_logprobs", 0)
    request = GenerationRequest("a", turns=((case["text"], None),), images=tuple(images))
    return vlm.engine().submit(request, options).wait(), texts


def ask(client, case, **more):
    given = {name: value for name, value in case.items() if name not in ("text", "images")}
    return client.chat.completions.create(
        model="tiny", messages=asking(case["text"], *case.get("images", ())), **given, **more
    )


def joined(stream):
    """Texts, chances and ends of a stream's choices, and its usage."""
    texts, chances, ends, usage = {}, {}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.logprobs is not None:
                chances.setdefault(choice.index, []).extend(choice.logprobs.content)
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
    return texts, chances, ends, usage


def test_mixed_concurrent_requests_get_the_answers_of_generate(vlm, client):
    expected = [engine_answer(vlm, case) for case in CASES]
    with ThreadPoolExecutor(2 * len(CASES)) as pool:
        whole = [pool.submit(ask, client, case) for case in CASES]
        more = {"stream": True, "stream_options": {"include_usage": True}}
        streams = [pool.submit(lambda case=case: joined(ask(client, case, **more))) for case in CASES]
        whole, streams = [each.result() for each in whole], [each.result() for each in streams]
    for (result, texts), answer, (pieces, chances, ends, usage) in zip(expected, whole, streams, strict=True):
        assert [choice.message.content for choice in answer.choices] == texts
        assert [pieces[index] for index in range(len(texts))] == texts
        for index, sequence in enumerate(result.sequences):
            choice = answer.choices[index]
            assert choice.finish_reason == ends[index] == sequence.finish_reason
            told = choice.logprobs.content if choice.logprobs is not None else []
            assert [each.logprob for each in told] == pytest.approx(list(sequence.logprobs), abs=1e-5)
            assert [each.logprob for each in chances.get(index, [])] == pytest.approx(list(sequence.logprobs), abs=1e-5)
            for each, top in zip(told, sequence.top_logprobs, strict=True):
                assert [other.logprob for other in each.top_logprobs] == pytest.approx(list(top.values()), abs=1e-5)
        assert usage.prompt_tokens == answer.usage.prompt_tokens == result.prompt_tokens
        new = sum(len(sequence.token_ids) for sequence in result.sequences)
        assert usage.completion_tokens == answer.usage.completion_tokens == new
        assert answer.usage.total_tokens == new + result.prompt_tokens


def test_tokens_of_logprobs_join_to_the_text(client):
    choice = ask(client, {"text": "Hello", "temperature": 0, "max_tokens": 8, "logprobs": True}).choices[0]
    tokens = [each.token for each in choice.logprobs.content]
    assert "".join(tokens).removesuffix("</s>").strip() == choice.message.content
    assert all(each.bytes is None or bytes(each.bytes).decode() == each.token for each in choice.logprobs.content)


def test_a_conversation_has_the_turns_of_the_template(vlm, client):
    from mindspeed_mm.data.sample import ImageBytes
    from mindspeed_mm.generation.engine import GenerationRequest

    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "First"}, asking("", RED)[0]["content"][0]],
        },
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Then?"},
    ]
    turns = (("First\n<image>", "Yes."), ("Then?", None))
    request = GenerationRequest("a", turns=turns, images=(ImageBytes("a", RED),), system="Be brief.")
    expected = vlm.engine().submit(request, {"max_new_tokens": 7}).wait()
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=7)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (expected.text, expected.prompt_tokens)


def test_stop_strings_end_the_text(client):
    case = {"text": "Hello", "temperature": 0, "max_tokens": 12}
    whole = ask(client, case).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    choice = ask(client, case, stop=[stop]).choices[0]
    assert choice.message.content == whole.split(stop)[0].strip() and choice.finish_reason == "stop"


def test_without_max_tokens_an_answer_has_the_room_of_the_context(vlm, client):
    case = {"text": "word " * 10, "temperature": 0}
    usage = ask(client, case, extra_body={"eos_token_id": 0}).usage
    assert usage.total_tokens <= vlm.engine().max_length


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="model 'other' does not exist"):
        client.models.retrieve("other")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on the PATH")
@pytest.mark.parametrize("stream", [False, True])
def test_the_documented_curl_line(vlm, client, stream):
    """As docs/serving.md has it, but for address, model and image."""
    from mindspeed_mm.data.sample import ImageBytes

    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    line = re.search(r"```bash\n(curl .*?)\n```", page, re.DOTALL)[1]
    line = line.replace("http://127.0.0.1:8000/v1/", str(client.base_url)).replace("llava-1.5-7b-hf", "tiny")
    line = line.replace("data:image/png;base64,...", data_url(RED))
    line = line.replace('"temperature"', f'"stream": {json.dumps(stream)}, "temperature"')
    told = subprocess.run([*shlex.split(line), "-sS"], capture_output=True, text=True, check=True).stdout
    expected = vlm.generate("What is in the picture?", [ImageBytes("image", RED)], max_new_tokens=64)[0]
    if stream:
        *events, done = [event.removeprefix("data: ") for event in told.split("\n\n") if event]
        assert done == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events) == expected
    else:
        assert json.loads(told)["choices"][0]["message"]["content"] == expected
