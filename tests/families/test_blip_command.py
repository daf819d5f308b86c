"""`mindspeed-mm train` with BLIP-2 and InstructBLIP: answers of the checkpoint, adapters and pairs at every layout."""

import json

import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import DataError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import model_block
from tests.helpers.golden_training import records
from tests.helpers.media import dataset_of
from tests.helpers.tiny_blip import QFORMER, QUERIES, question_words, square_processor
from tests.helpers.tiny_llava import VISION, close, decoder_config, image
from tests.parallel.test_command import LAYOUTS, train

FLAGS = "--lr 1e-2 --train-iters 2 --micro-batch-size 2 --global-batch-size 4 --seq-length 64 --num-workers 0"
CLASSES = {
    "blip2": (transformers.Blip2Config, transformers.Blip2ForConditionalGeneration),
    "instructblip": (transformers.InstructBlipConfig, transformers.InstructBlipForConditionalGeneration),
}


@pytest.fixture(params=CLASSES)
def run(request, golden, tmp_path):
    """(name, folder of a model with the golden tokenizer's words, data.json)."""
    config, model = CLASSES[request.param]
    words = load_tokenizer(golden / "tokenizer")
    parts = {"vision_config": VISION, "qformer_config": QFORMER, "num_query_tokens": QUERIES}
    made = model(config(text_config=decoder_config("llama", vocab_size=words.vocab_size), **parts))
    made.save_pretrained(tmp_path / "model")
    square_processor().save_pretrained(tmp_path / "model")
    if request.param == "instructblip":
        question_words().save_pretrained(tmp_path / "model" / "qformer_tokenizer")
    rows = []
    for number in range(4):
        image(20, 30, seed=number).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\nw7 w{8 + number}"}, {"from": "gpt", "value": "A cat."}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "records.json").write_text(json.dumps(rows))
    data = {
        "dataset_type": "llava",
        "template_name": request.param,
        "basic_parameters": {"data_path": str(tmp_path / "records.json"), "data_folder": str(tmp_path)},
        "preprocess_parameters": {"image_processer_path": str(tmp_path / "model")},
        "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
    }
    (tmp_path / "data.json").write_text(json.dumps({"dataset_param": data}))
    return request.param, tmp_path / "model", tmp_path / "data.json"


def write_model(name, folder, target, **decoder):
    """A model.json of the folder's weights with a frozen vision encoder; `decoder`: keys of the text decoder."""
    block = model_block(describe_model(open_source(folder)).part_specs(), name)
    for part in (block["text_decoder"], *block["image_encoder"].values()):
        part["ckpt_path"] = str(folder)
    block["image_encoder"]["vision_encoder"]["freeze"] = True
    block["text_decoder"] |= decoder
    target.write_text(json.dumps(block))


def test_train_and_answer(run, tmp_path, single_process):
    name, folder, data = run
    write_model(name, folder, tmp_path / "model.json")
    files = ["--mm-model", str(tmp_path / "model.json"), "--mm-data", str(data), "--device", "cpu"]
    assert main(["train", *files, *FLAGS.split(), "--save", str(tmp_path / "save")]) == 0
    ours = mm.load(tmp_path / "save", device="cpu")
    assert ours.template == name
    assert len(ours.generate("w9 w10", [image(9, 9)], max_new_tokens=3)) == 1
    assert main(["convert", str(tmp_path / "save"), str(tmp_path / "out"), "--to", name]) == 0
    theirs, report = CLASSES[name][1].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    given = {"input_ids": torch.tensor([[*[theirs.config.image_token_index] * QUERIES, 1, 7, 9]])}
    given["pixel_values"] = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    given |= {"qformer_input_ids": torch.tensor([[2, 7, 3]])} if name == "instructblip" else {}
    with torch.no_grad():
        close(mm.load(tmp_path / "out", device="cpu").logits(**given), theirs.eval()(**given).logits)
    changed = dict(ours.model.image_encoder.projector.named_parameters())["query_tokens"]
    assert not torch.equal(changed, open_source(folder).part("vision_projector").get("query_tokens"))


@pytest.mark.parametrize(
    "run, way",
    [
        ("blip2", "packed"),
        pytest.param("blip2", "pairs", marks=pytest.mark.slow),
        pytest.param("instructblip", "packed", marks=pytest.mark.slow),
    ],
    indirect=["run"],  # InstructBLIP's pairs: tests/objectives/test_hadpo_recipes.py
)
def test_adapters_at_every_layout(run, way, ranks, tmp_path):
    """Beside the trained Q-Former: packed conversations, and DPO with the adapters' reference."""
    name, folder, data = run
    lora = {"r": 3, "alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    write_model(name, folder, tmp_path / "model.json", lora=lora)
    content = json.loads(data.read_text())
    if way == "packed":
        content["dataloader_param"] = {"packing": True}
    else:
        sides = {"prompt": "<image>\nw7", "chosen": "A cat.", "rejected": "A dog and a cat."}
        rows = [sides | {"prompt": f"<image>\nw7 w{n}", "images": [f"{n}.png"]} for n in range(4)]
        (tmp_path / "records.json").write_text(json.dumps(rows))
        content["dataset_param"]["dataset_type"], content["objective"] = "preference", "dpo"
    data.write_text(json.dumps(content))
    assert ranks(1).run(train, str(tmp_path), "one", "--lr 1e-2") == [0]
    wanted = records(tmp_path / "one")
    assert wanted[0]["loss"] != wanted[2]["loss"]
    for layout in ("TP2 SP", "PP2"):
        assert ranks(2).run(train, str(tmp_path), layout, f"--lr 1e-2 {LAYOUTS[layout]}") == [0, 0]
        for row, other in zip(records(tmp_path / layout), wanted, strict=True):
            keys = [key for key in row if key in ("loss", "grad_norm") or key.startswith(("rewards/", "logps/"))]
            assert len(keys) >= (2 if way == "packed" else 8)
            for key in keys:
                assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (layout, key)


def test_the_question_of_a_record_goes_with_its_image(run, golden):
    name, folder, data = run
    config = DataConfig(**json.loads(data.read_text()))
    spec = describe_model(open_source(folder))
    media = spec.family.media_processor(spec, folder)
    dataset = dataset_of(config, load_tokenizer(golden / "tokenizer"), QUERIES, 64)
    dataset.media = media
    asked = [dataset[number].media[0].instructions for number in range(4)]
    words = ((2, 7, 8 + number, 3) for number in range(4))
    assert asked == ([(question,) for question in words] if name == "instructblip" else [()] * 4)


def test_a_question_that_is_too_long_names_its_record(run, golden, tmp_path):
    name, folder, data = run
    if name == "blip2":
        return
    rows = json.loads((tmp_path / "records.json").read_text())
    rows[2]["conversations"][0]["value"] = "<image>\n" + "w5 " * 61
    (tmp_path / "records.json").write_text(json.dumps(rows))
    spec = describe_model(open_source(folder))
    config = DataConfig(**json.loads(data.read_text()))
    dataset = dataset_of(config, load_tokenizer(golden / "tokenizer"), QUERIES, 512)
    dataset.media = spec.family.media_processor(spec, folder)
    with pytest.raises(DataError, match=r"\(id 2\): has a question of 63 words of the Q-Former"):
        dataset[2]
