"""Otter through the commands: trained on MIMIC-IT and LLaVA's records, resumed, asked and planned."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.data.build import build_dataset
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.generation.engine import GenerationRequest
from mindspeed_mm.models.complete import read_model
from mindspeed_mm.models.family import media_of_data
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.platform import get_platform
from tests.helpers import flamingo_reference
from tests.helpers.golden_training import full_tensors, records
from tests.helpers.media import dataset_of
from tests.helpers.tiny_flamingo import letters
from tests.helpers.tiny_llava import IMAGE_ID, image

ROOT = Path(__file__).parents[2]
ROWS = END, ANSWER, MEDIA = [IMAGE_ID - 2, IMAGE_ID - 1, IMAGE_ID]
EOS = 2
WORDS, HEAD = "text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight"
FLAGS = "--device cpu --lr 1e-2 --lr-decay-style constant --weight-decay 0.1 --micro-batch-size 2 --seq-length 200"


def encoded(seed: int) -> str:
    data = io.BytesIO()
    image(30, 20, seed).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, MIMIC-IT's files with examples in context, LLaVA's records, and the JSON files that name them."""
    folder = tmp_path_factory.mktemp("otter")
    theirs = flamingo_reference.FlamingoReference().eval()
    letters(IMAGE_ID + 1).save_pretrained(flamingo_reference.save(theirs, folder / "model"))
    instructions = {
        f"I_{number}": {
            "instruction": f"what {number}?",
            "answer": f"so {number}",
            "image_ids": [f"IMG_{number}"],
            "rel_ins_ids": [f"I_{(number + 1) % 4}", f"I_{(number + 2) % 4}"],
        }
        for number in range(4)
    }
    (folder / "I.json").write_text(json.dumps({"meta": {}, "data": instructions}))
    (folder / "images.json").write_text(json.dumps({f"IMG_{number}": encoded(number) for number in range(4)}))
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "No."}]
    turns += [{"from": "human", "value": "Hm"}, {"from": "gpt", "value": "Ho ho"}]
    image(20, 20, 9).save(folder / "a.png")
    (folder / "llava.json").write_text(
        json.dumps([{"id": str(n), "image": "a.png", "conversations": turns} for n in "ab"])
    )
    mimic_it = {"images": str(folder / "images.json"), "in_context": True}
    videos = {"images": str(folder / "images.json"), "frames": 2}
    video = {"instruction": "seen?", "answer": "yes", "image_ids": ["IMG_0", "IMG_1", "IMG_2"], "rel_ins_ids": []}
    (folder / "V.json").write_text(json.dumps({"data": {"V_0": video, "V_1": video | {"answer": "no"}}}))
    sets = [
        {"dataset_type": "mimic_it", "data_path": str(folder / "I.json"), "mimic_it": mimic_it},
        {"dataset_type": "llava", "data_path": str(folder / "llava.json"), "data_folder": str(folder)},
        {"dataset_type": "mimic_it", "data_path": str(folder / "V.json"), "mimic_it": videos},
    ]
    parameters = {
        "dataset_type": "mimic_it",
        "basic_parameters": sets,
        "preprocess_parameters": {"image_processer_path": str(folder / "model")},
        "tokenizer_config": {"from_pretrained": str(folder / "model")},
    }
    (folder / "data.json").write_text(json.dumps({"dataset_param": parameters}))
    (folder / "model.json").write_text(json.dumps(short_model(folder)))
    return folder


def short_model(folder) -> dict:
    """What docs/flamingo.md shows: sizes are those of the weights."""
    weights = {"ckpt_path": str(folder / "model")}
    rules = [
        {"names": "decoder.layers.*.gated_cross.*", "freeze": False},
        {"names": "embedding.word_embeddings.weight", "freeze": False, "rows": ROWS},
        {"names": "output_layer.weight", "freeze": False, "rows": ROWS},
    ]
    return {
        "model_id": "flamingo",
        "text_decoder": weights | {"freeze": True, "parameters": rules},
        "image_encoder": {"vision_encoder": weights | {"freeze": True}, "vision_projector": dict(weights)},
    }


def train(folder, name: str, *flags: str, model: str = "model.json", steps: int = 4) -> dict[str, torch.Tensor]:
    """The tensors of a run."""
    get_platform("cpu")
    from megatron.driver.initialize import shutdown

    shutdown()  # an earlier test may have loaded a model
    files = ["--mm-model", str(folder / model), "--mm-data", str(folder / "data.json")]
    assert (
        main(["train", *files, *FLAGS.split(), "--train-iters", str(steps), "--save", str(folder / name), *flags]) == 0
    )
    return full_tensors(folder / name)


@pytest.fixture(scope="module")
def run(folder):
    """The tensors of four steps."""
    return train(folder, "run")


def otters_labels(ids: list[int]) -> list[int]:
    """What Otter's training script supervises: from behind each <answer> up to its <|endofchunk|>, and EOS."""
    labels, open_answer = [], False
    for place, token in enumerate(ids):
        learned = (open_answer or token == EOS) and place > 0
        labels.append(token if learned else -100)
        open_answer = token == ANSWER or (open_answer and token != END)
    return labels


def test_losses_are_those_of_answers(folder):
    data = json.loads((folder / "data.json").read_text())
    data["dataset_param"]["template_name"] = "otter"
    spec = read_model(folder / "model.json")
    config, tokenizer = DataConfig.load(data), load_tokenizer(folder / "model")
    found = build_dataset(config, tokenizer, media_of_data(spec, config), 200)
    for number, images in enumerate((3, 3, 3, 3, 1, 1, 1, 1)):
        sample = found[number]
        assert sample.input_ids.count(-200) == len(sample.media) == images
        assert sample.labels == otters_labels(sample.input_ids)
        assert sample.input_ids[-2:] == [END, EOS] and sample.input_ids.count(EOS) == 1
        pairs = 3 if images == 3 else 1 if number > 5 else 2
        assert sample.input_ids.count(ANSWER) == sample.labels.count(END) == pairs
    assert found[6].media[0].rows == (2,) and found[6].media[0].pixels.shape[0] == 2
    with pytest.raises(ConfigError, match='V.json: found "frames", which puts .* expected a model that takes videos'):
        dataset_of(config, tokenizer, 1, 200)
    first = found[0].input_ids
    text = tokenizer.decode([MEDIA if token == -200 else token for token in first], skip_special_tokens=False)
    shown = [f"<image>User: what {number}? GPT:<answer> so {number}<|endofchunk|>" for number in (1, 2, 0)]
    assert text.removeprefix("<s>") == "".join(shown) + "</s>"


def test_what_moves(folder, run):
    source = open_source(folder / "model")
    first = {WORDS: source.part("text_decoder").get("model.embed_tokens.weight")}
    first[HEAD] = source.part("text_decoder").get("lm_head.weight")
    others = [row for row in range(len(first[WORDS])) if row not in ROWS]
    for name, before in first.items():
        # Weight decay, on for all else, would have moved each row by 0.1 %.
        assert torch.equal(run[name][others], before[others].float()), name
    assert all((run[WORDS][row] != first[WORDS][row]).any() for row in ROWS)
    layer = "text_decoder.decoder.layers.1."
    before = source.part("text_decoder").get("model.layers.1.decoder_layer.mlp.down_proj.weight")
    assert torch.equal(run[layer + "mlp.linear_fc2.weight"], before.float())
    gate = source.part("text_decoder").get("model.layers.1.gated_cross_attn_layer.attn_gate")
    assert (run[layer + "gated_cross.attention_gate"] != gate).all()
    latents = source.part("vision_projector").get("latents")
    assert (run["image_encoder.projector.latents"] != latents).all()
    losses = [record["loss"] for record in records(folder / "run")]
    assert losses[-1] < losses[0]


def test_a_run_goes_out_as_open_flamingos_checkpoint(folder, run, tmp_path):
    assert main(["convert", str(folder / "run"), str(tmp_path / "c.pt"), "--to", "flamingo-trained"]) == 0
    found = torch.load(tmp_path / "c.pt", weights_only=True)
    rows = found["lang_encoder.model.embed_tokens.weight"]
    assert torch.equal(rows, run[WORDS][: len(rows)]) and "lang_encoder.lm_head.weight" in found
    assert torch.equal(found["perceiver.latents"], run["image_encoder.projector.latents"])
    gate = found["lang_encoder.model.layers.1.gated_cross_attn_layer.attn_gate"]
    assert torch.equal(gate, run["text_decoder.decoder.layers.1.gated_cross.attention_gate"])
    assert not [name for name in found if "decoder_layer" in name or "vision" in name]


def test_merged_adapters_go_out_and_a_trained_encoder_does_not(folder, tmp_path):
    block = short_model(folder)
    block["text_decoder"] |= {"lora": {"r": 2, "alpha": 4, "target_modules": ["o_proj"]}, "freeze": False}
    (folder / "lora.json").write_text(json.dumps(block))
    train(folder, "lora", model="lora.json", steps=1)
    mm.convert(folder / "lora", tmp_path / "c.pt", to="flamingo-trained")
    own = {name for name in torch.load(tmp_path / "c.pt", weights_only=True) if "decoder_layer" in name}
    assert own == {f"lang_encoder.model.layers.{layer}.decoder_layer.self_attn.o_proj.weight" for layer in range(4)}
    block = short_model(folder)
    block["image_encoder"]["vision_encoder"].pop("freeze")
    (folder / "seeing.json").write_text(json.dumps(block))
    train(folder, "seeing", model="seeing.json", steps=1)
    with pytest.raises(WeightError, match="the run trained the vision_encoder, for which"):
        mm.convert(folder / "seeing", tmp_path / "d.pt", to="flamingo-trained")


def test_a_run_goes_on_exactly(folder, run):
    load = ("--load", str(folder / "half"))
    train(folder, "half", *load, "--exit-interval", "2")
    found = train(folder, "half", *load)
    assert found.keys() == run.keys()
    assert all(torch.equal(tensor, run[name]) for name, tensor in found.items())


def test_layers_that_are_run_again_change_nothing(folder, run):
    model = short_model(folder)
    model["text_decoder"] |= {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}
    (folder / "recomputed.json").write_text(json.dumps(model))
    found = train(folder, "recomputed", model="recomputed.json")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, run[name], atol=1e-6, rtol=1e-5, msg=name)


def test_infer_and_chat(folder, monkeypatch, capsys, tmp_path):
    """Both see the image, in Otter's template, and answer as the library does."""
    for seed in range(2):
        image(30, 40, seed).save(tmp_path / f"{seed}.png")
    common = ["--model", str(folder / "model"), "--device", "cpu", "--max-new-tokens", "4"]
    lines = [{"prompt": "w3 w4", "image": "0.png"}, {"prompt": "w3 w4", "image": "1.png"}, {"prompt": "w3 w4"}]
    lines += [{"prompt": "<image>w3 <image>w4", "image": ["0.png", "1.png"]}]
    example = {"prompt": "w5", "answer": "w6", "image": "1.png"}
    lines += [
        {"prompt": "w3 w4", "image": "0.png", "examples": [example, example | {"answer": answer}]}
        for answer in ("w7", "w8")
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["infer", *common, *files]) == 0
    answers = [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    vlm = mm.load(folder / "model", device="cpu")
    shown = [[str(tmp_path / name) for name in names] for names in (["0.png"], ["1.png"], [], ["0.png", "1.png"])]
    assert answers[:4] == vlm.generate([line["prompt"] for line in lines[:4]], shown, max_new_tokens=4)
    images = (*shown[1], *shown[1], *shown[0])
    for second, answer in zip(("w7", "w8"), answers[4:], strict=True):
        turns = (("<image>w5", "w6"), ("<image>w5", second), ("<image>w3 w4", None))
        request = GenerationRequest("", turns, images=images)
        assert [each.text for each in vlm.engine().generate([request], {"max_new_tokens": 4}, 1)] == [answer]
    prepared = vlm.engine().prepare(GenerationRequest("", ((lines[0]["prompt"], None),), images=tuple(shown[0])))
    assert prepared.count(-200) == 1 and prepared[-1] == ANSWER

    end, start = os.pipe()
    with open(start, "w") as pipe:
        pipe.writelines(f"{line}\n" for line in (f"{tmp_path}/0.png w3 w4", f"{tmp_path}/1.png w5"))
    with open(end) as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", pipe)
        capsys.readouterr()
        assert main(["chat", *common, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["conversation"]["conversations"]
    assert [turn["value"] for turn in told[::2]] == ["<image>w3 w4", "<image>w5"]
    assert told[1]["value"] == answers[0]
    asked = GenerationRequest(
        "", (("<image>w3 w4", answers[0]), ("<image>w5", None)), images=(shown[0][0], shown[1][0])
    )
    (again,) = vlm.engine().generate([asked], {"max_new_tokens": 4}, 1)
    assert told[3]["value"] == again.text


def test_media_without_a_place(folder, tmp_path, capsys):
    """A record of LLaVA's whose text has no <image>, and a request with fewer of them than images."""
    record = {
        "id": "1",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "w3"}, {"from": "gpt", "value": "w4"}],
    }
    (tmp_path / "llava.json").write_text(json.dumps([record]))
    data = json.loads((folder / "data.json").read_text())
    data["dataset_param"]["basic_parameters"][1]["data_path"] = str(tmp_path / "llava.json")
    (tmp_path / "data.json").write_text(json.dumps(data))
    line = ["train", "--mm-model", str(folder / "model.json"), "--mm-data", str(tmp_path / "data.json"), *FLAGS.split()]
    assert main([*line, "--train-iters", "1"]) == 1
    assert "holds 0 <image> placeholders" in capsys.readouterr().err
    image(30, 40).save(tmp_path / "0.png")
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "<image>w3", "image": ["0.png", "0.png"]}) + "\n")
    common = ["--model", str(folder / "model"), "--device", "cpu", "--input", str(tmp_path / "in.jsonl")]
    assert main(["infer", *common, "--output", str(tmp_path / "out.jsonl")]) == 1
    assert "found 2 images and 1" in capsys.readouterr().err


def test_the_plan_of_otter(capsys):
    """examples/otter on 8 devices: 32 layers, 8 blocks; what is trained and held follows from the parts."""
    line = "--devices 8 --memory 64GB --bf16 --seq-length 2048 --global-batch-size 128 --micro-batch-size 1 --json"
    layout = "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1"
    assert main(["plan", "--mm-model", "examples/otter/model_mpt7b.json", *line.split(), *layout.split()]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (stage,) = report["layouts"][0]["stages"]
    block = 4096 * 512 * 2 + 2 * 1024 * 512 + 2 * 4096 * 16384 + 4 * 4096 + 2
    decoder = 32 * (4 * 4096**2 + 2 * 4096 * 16384 + 2 * 4096) + 4096 + 50432 * 4096 + 8 * block
    perceiver = 6 * (4 * 1024 * 512 + 2 * 1024 * 4096 + 6 * 1024) + 64 * 1024 + 2 * 1024
    clip = 24 * (4 * 1024**2 + 2 * 1024 * 4096 + 13 * 1024) + 1024 * (588 + 257 + 1) + 2 * 1024
    assert stage["parameters"] == 2 * (decoder + perceiver + clip)
    assert stage["gradients"] == 4 * (50432 * 4096 + 8 * block + perceiver)


@pytest.mark.slow
def test_digits(tmp_path):
    """The small run of the example from end to end, too short to learn."""
    command = [sys.executable, "-m", "examples.otter.digits", "--fast", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["n"] == 8 and 0 <= found["with examples"] <= 1
