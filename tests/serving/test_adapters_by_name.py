"""Several adapters on one base: each name answers as mm.load(path, adapter=DIR) does, whatever runs beside it."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import peft
import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.cli.flags.adapters import named_adapters
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import ConfigError, WeightError
from tests.helpers.loopback import asking, png, serving

IMAGE = png(30, 20)
QUESTIONS = [("What is it?", [IMAGE]), ("Tell me more of it", []), ("And now?", [png(21, 40, (9, 99, 200))])]
TARGETS = {"all": "all-linear", "few": ["q_proj", "down_proj"]}
DRAWN = {"do_sample": True, "temperature": 1.3, "seed": 4, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def path(golden):
    return golden / "models" / "llava_hf"


@pytest.fixture(scope="module")
def made(path, tmp_path_factory):
    """Folders of two adapters, by name."""
    found = {}
    for number, (name, targets) in enumerate(TARGETS.items()):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        model.lm_head.requires_grad_(False)
        config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets, exclude_modules=["lm_head"])
        wrapped = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(number)
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        found[name] = tmp_path_factory.mktemp("adapters") / name
        wrapped.save_pretrained(found[name])
    return found


@pytest.fixture
def folders(made, tmp_path):
    """Copies that a test may change."""
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in made.items()}


def lanes_of(path, folders):
    from mindspeed_mm.serving.ranks import joined_lanes

    vlm = mm.load(path, device="cpu")
    return joined_lanes(vlm, "base", lambda: vlm.engine(batch_size=2), folders)[0]


def service_of(lanes):
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.service import ChatService

    return ChatService(lanes, ServingLimits(batch_size=2))


@pytest.fixture(scope="module")
def wanted(path, made):
    """name -> texts of the questions, by a model that is loaded with its adapter."""
    from mindspeed_mm.data.sample import ImageBytes

    found = {}
    for name, folder in {"base": None, **made}.items():
        vlm = mm.load(path, device="cpu", adapter=folder)
        found[name] = [
            vlm.generate(text, [ImageBytes("image", data) for data in images], **DRAWN)[0] for text, images in QUESTIONS
        ]
    return found


def ask(address, name, text, images):
    body = {"model": name, "messages": asking(text, *images), "temperature": 1.3, "seed": 4, "max_tokens": 12}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    assert answer["model"] == name
    return answer["choices"][0]["message"]["content"]


def test_concurrent_requests_of_several_adapters(path, made, wanted):
    assert len({tuple(texts) for texts in wanted.values()}) == 3
    with serving(service_of(lanes_of(path, made))) as server, ThreadPoolExecutor(9) as pool:
        models = httpx.get(f"{server.address}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["base", "all", "few"]
        asked = [(name, number) for number in range(len(QUESTIONS)) for name in wanted]
        texts = pool.map(lambda case: ask(server.address, case[0], *QUESTIONS[case[1]]), asked)
        assert list(texts) == [wanted[name][number] for name, number in asked]


def test_an_adapter_is_read_again(path, folders, wanted):
    lanes = lanes_of(path, folders)
    with serving(service_of(lanes)) as server:

        def reload(name, **more):
            return httpx.post(f"{server.address}/v1/models/{name}/reload", **({"json": {}} | more), timeout=60)

        assert ask(server.address, "few", *QUESTIONS[0]) == wanted["few"][0]
        shutil.copytree(folders["all"], folders["few"], dirs_exist_ok=True)
        assert ask(server.address, "few", *QUESTIONS[0]) == wanted["few"][0]
        assert reload("few").json() == {"id": "few", "status": "reloaded"}
        assert ask(server.address, "few", *QUESTIONS[0]) == wanted["all"][0]
        assert ask(server.address, "base", *QUESTIONS[0]) == wanted["base"][0]
        (folders["few"] / "adapter_model.safetensors").write_bytes(b"damaged")
        refused = reload("few")
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "adapter_not_read"
        assert ask(server.address, "few", *QUESTIONS[0]) == wanted["all"][0]
        assert "'base' is no adapter" in reload("base").json()["error"]["message"]
        assert reload("other").status_code == 404
        assert reload("few", json=None, content=b"{}").status_code == 415


def test_what_runs_ends_with_the_adapter_that_it_began_with(path, folders, wanted):
    from mindspeed_mm.generation.engine import GenerationRequest
    from mindspeed_mm.serving.lanes import BeginOrder, CancelOrder, ReloadOrder

    lanes = lanes_of(path, folders)
    text, images = QUESTIONS[1]
    assert not images
    request = GenerationRequest("a", turns=((text, None),))
    wanted, other = wanted["few"][1], wanted["all"][1]
    before = lanes.take(BeginOrder(1, "few", request, DRAWN))
    gone = lanes.take(BeginOrder(2, "all", request, DRAWN))
    for _ in range(5):
        lanes.step()
    shutil.copytree(folders["all"], folders["few"], dirs_exist_ok=True)
    lanes.take(ReloadOrder("few"))
    lanes.take(CancelOrder(2))
    after = lanes.take(BeginOrder(3, "few", request, DRAWN))
    while lanes.busy:
        lanes.step()
    assert before.result.text == wanted != other == after.result.text
    assert gone.result.sequences[0].finish_reason == "cancelled"
    with pytest.raises(ConfigError, match="'base' is no adapter"):
        lanes.take(ReloadOrder("base"))
    (folders["few"] / "adapter_config.json").unlink()
    with pytest.raises(WeightError, match="found no adapter_config.json"):
        lanes.take(ReloadOrder("few"))


def test_names(tmp_path, path, folders, capsys):
    assert named_adapters(None, "base") == (None, {})
    assert named_adapters(["runs/a=1"], "base") == ("runs/a=1", {})
    assert named_adapters(["a=x", "b=y=z"], "base")[1].keys() == {"a", "b"}
    for given, match in [
        (["a b=x"], "expected NAME=DIR"),
        (["a="], "expected NAME=DIR"),
        (["base=x"], "the model without adapters has the name base"),
        (["a=x", "a=y"], "another adapter has the name a"),
        (["x", "a=y"], "goes with no other adapter"),
    ]:
        with pytest.raises(ConfigError, match=match):
            named_adapters(given, "base")
    start = ["serve", "--model", str(path), "--device", "cpu", "--port", "0", "--check", "--json"]
    assert main([*start, "--adapter", f"few={folders['few']}"]) == 0
    assert '"models": ["llava_hf", "few"]' in capsys.readouterr().out
    assert main([*start, "--adapter", f"few={tmp_path}"]) == 1
    assert "found no adapter_config.json" in capsys.readouterr().err
