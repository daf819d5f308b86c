"""A model.json that names its weights and leaves out what they say: swapping the decoder is one line."""

import difflib
import json

import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.complete import read_model
from tests.helpers.tiny_decoders import as_internlm2, make, rows
from tests.helpers.tiny_llava import clip, close, fixed_processor, randomised

FLAGS = (
    "--lr 1e-3 --train-iters 2 --micro-batch-size 1 --global-batch-size 2 --seq-length 96 --log-interval 1 "
    "--num-workers 0 --device cpu --lr-decay-style constant"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Vicuna, an InternLM2 of other sizes and a CLIP, each in a folder of its own, and the InternLM2 as a Llama."""
    folder = tmp_path_factory.mktemp("weights")
    make("llama", vocab_size=1004).save_pretrained(folder / "vicuna")
    sizes = {"hidden_size": 60, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 1012}
    theirs = make("llama", **sizes)
    theirs.save_pretrained(folder / "internlm2-chat")
    as_internlm2(folder / "internlm2-chat")
    randomised(transformers.CLIPVisionModel(clip())).save_pretrained(folder / "clip")
    fixed_processor("clip").save_pretrained(folder / "clip")
    return folder, theirs


@pytest.fixture
def model(weights, tmp_path):
    """The text of a model.json around the Vicuna."""
    folder = weights[0]
    decoder = {"ckpt_path": str(folder / "vicuna"), "freeze": True}
    encoder = {"ckpt_path": str(folder / "clip"), "freeze": True}
    parts = {"vision_encoder": encoder, "vision_projector": {}}
    return json.dumps({"text_decoder": decoder, "image_encoder": parts}, indent=2)


def test_the_guides_swap_is_one_line(weights, model, golden, tmp_path, single_process):
    """XTuner's guide, "how to swap the LLM": its first step here, the second is data.json's template_name."""
    folder, theirs = weights
    swapped = model.replace("vicuna", "internlm2-chat")
    changes = [line for line in difflib.ndiff(model.splitlines(), swapped.splitlines()) if line[0] in "+-"]
    assert len(changes) == 2  # one line, before and after
    assert get_template("internlm2_chat").stop
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho ho."}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(4)]))
    data = {
        "dataset_type": "multimodal",
        "basic_parameters": {"data_path": str(tmp_path / "text.json")},
        "preprocess_parameters": {"image_processer_path": str(folder / "clip")},
        "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
    }
    (tmp_path / "data.json").write_text(json.dumps({"dataset_param": data}))
    for name, text in (("vicuna", model), ("internlm2", swapped)):
        path, save = tmp_path / f"{name}.json", tmp_path / name
        path.write_text(text)
        files = ("--mm-model", str(path), "--mm-data", str(tmp_path / "data.json"), "--save", str(save))
        assert main(["train", *files, *FLAGS.split()]) == 0
    found = {name: mm.load(tmp_path / name, device="cpu").spec for name in ("vicuna", "internlm2")}
    assert found["vicuna"].text_decoder.model_id == "llama" and found["vicuna"].vision_projector.hidden_size == 48
    spec = found["internlm2"]
    assert (spec.text_decoder.model_id, spec.text_decoder.num_layers) == ("internlm2", 2)
    assert (spec.vision_projector.input_size, spec.vision_projector.hidden_size) == (32, 60)
    ids = rows()
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
    for path in (tmp_path / "internlm2", tmp_path / "internlm2.json"):  # trained with a frozen decoder, and untrained
        close(mm.load(path, device="cpu").logits(ids), wanted)


def test_keys_that_are_there_count(weights, model):
    block = json.loads(model)
    block["image_encoder"]["vision_encoder"]["select_layer"] = 1
    block["image_encoder"]["vision_projector"]["num_layers"] = 1
    spec = read_model(block)
    assert spec.vision_encoder.select_layer == 1 and spec.vision_encoder.num_layers == 3
    assert spec.vision_projector.num_layers == 1 and spec.vision_projector.ffn_hidden_size == 48


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_id": "internlm2"}, ConfigError, 'model_id is "internlm2", the weights .* are those of a "llama"'),
        ({"ckpt_path": "nowhere"}, WeightError, "nowhere: no such file or folder"),
        ({"hidden_sise": 3}, ConfigError, 'hidden_sise: unknown key; did you mean "hidden_size"'),
        ({"num_query_groups": 5}, ConfigError, "num_attention_heads 6 is not a multiple of num_query_groups 5"),
        ({"ckpt_path": None}, ConfigError, "num_layers: missing"),
    ],
)
def test_what_does_not_fit_the_weights_is_refused(weights, model, changes, error, message):
    block = json.loads(model)
    block["text_decoder"] |= changes
    with pytest.raises(error, match=message):
        read_model(block)
