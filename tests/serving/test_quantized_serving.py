"""`serve --quantize`, with an adapter beside the base: the answers of a model that was loaded so."""

import shutil
import threading

import httpx
import peft
import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from tests.helpers.loopback import asking, png

IMAGE = png(30, 20)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture
def saved(golden, tmp_path):
    """(folder of a model whose rows have blocks of 64, folder of an adapter)."""
    golden, path = golden / "models" / "llava_hf", tmp_path / "tiny"
    config = transformers.LlavaConfig.from_pretrained(golden)
    config.text_config.update(SIZES | {"head_dim": 32})
    torch.manual_seed(3)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(golden / name, path)
    shutil.copy(golden / "preprocessor_config.json", path)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.3)
    wrapped.save_pretrained(tmp_path / "tuned")
    return path, tmp_path / "tuned"


@pytest.mark.parametrize("flags", [("--quantize", "nf4", "--double-quant"), ("--quantize", "int8")])
def test_answers_are_those_of_the_quantised_model(saved, monkeypatch, flags):
    from mindspeed_mm.data.sample import ImageBytes
    from mindspeed_mm.serving.server import AddressServer

    path, adapter = saved
    kind, found, serve = {"quantize": flags[1], "double_quant": "--double-quant" in flags}, {}, AddressServer.run

    def ask_and_end(server, sockets):
        thread = threading.Thread(target=serve, args=(server, sockets))
        thread.start()
        assert server.ready.wait(60)
        for name in ("tiny", "tuned"):
            body = {"model": name, "messages": asking("What?", IMAGE), "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60).json()
            found[name] = answer["choices"][0]["message"]["content"]
        server.end()
        thread.join(60)

    monkeypatch.setattr(AddressServer, "run", ask_and_end)
    words = ["serve", "--model", str(path), "--device", "cpu", "--port", "0", "--adapter", f"tuned={adapter}"]
    assert main([*words, *flags]) == 0
    for name, folder in (("tiny", None), ("tuned", adapter)):
        vlm = mm.load(path, device="cpu", adapter=folder, **kind)
        assert vlm.generate("What?", [ImageBytes("image", IMAGE)], max_new_tokens=8) == [found[name]]
    assert found["tiny"] != found["tuned"]
