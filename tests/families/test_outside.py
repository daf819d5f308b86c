"""One of each kind from another package: the examples of docs/adding_a_family.md, executed as they stand there."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.evaluation.evaluation_helpers import image_cell, write_table
from tests.helpers import tiny_llava
from tests.helpers.tiny_llava import IMAGE_ID, close

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/adding_a_family.md"
BLOCK = re.compile(r"^```(python|json)\n# (outside/\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder for PYTHONPATH that holds the page's package, installed with its entry point."""
    folder = tmp_path_factory.mktemp("site")
    for _, name, text in BLOCK.findall(PAGE.read_text()):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    installed = folder / "outside-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[mindspeed_mm.plugins]\noutside = outside\n")
    return folder


def run(outside: Path, *command: str, cwd: Path) -> str:
    """A Python process that finds the package; its stdout."""
    paths = os.pathsep.join([str(outside), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout


@pytest.fixture(scope="module")
def theirs():
    """transformers' LLaVA around a Seed-OSS and an I-JEPA."""
    sizes = {"head_dim": 10, "attention_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0}
    text = transformers.SeedOssConfig(**(tiny_llava.TEXT | {"pad_token_id": 0, "vocab_size": 1004} | sizes))
    vision = transformers.IJepaConfig(**(tiny_llava.VISION | {"layer_norm_eps": 1e-12}))
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_ID, pad_token_id=0, **tiny_llava.FULL
    )
    return tiny_llava.randomised(transformers.LlavaForConditionalGeneration(config))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """Its folder."""
    processor = transformers.ViTImageProcessorPil(size={"height": 28, "width": 28})
    return tiny_llava.save(theirs, tmp_path_factory.mktemp("llava"), processor)


@pytest.fixture(scope="module")
def normed(folder, tmp_path_factory):
    """The same under the names of the page's family, with a norm before the projector."""
    target = tmp_path_factory.mktemp("normed")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "norm_llava"}
    (target / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name.replace("multi_modal_projector.", "connector.linears.")] = tensor
    generator = torch.Generator().manual_seed(4)
    for kind in ("weight", "bias"):
        tensors[f"connector.norm.{kind}"] = torch.randn(32, generator=generator)
    save_file(tensors, target / "model.safetensors")
    return target


def given():
    """(ids with image positions, pixels)."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, IMAGE_ID, (2, 30), generator=generator)
    text[:, 5:21] = IMAGE_ID
    return text, torch.randn(2, 3, 28, 28, generator=generator)


SHOW = """
import sys, torch
import mindspeed_mm as mm

ids, pixels = torch.load("given.pt", weights_only=True)
ids = ids.masked_fill(ids == 130, -200)
rows = [ids[0].tolist(), ids[1, 21:].tolist()]
shown = []
for number in range(1, len(sys.argv), 3):
    path, target, to = sys.argv[number : number + 3]
    vlm = mm.load(path, device="cpu")
    mm.convert(path, target, to=to)
    again = mm.load(target, device="cpu")
    text = vlm.generate(input_ids=rows, images=pixels[:1], max_new_tokens=7, eos_token_id=-1)
    shown.append((vlm.spec.model_id, vlm.logits(ids, None, pixels), again.logits(ids, None, pixels), text))
torch.save(shown, "shown.pt")
"""


def shown(outside, tmp_path, *exports):
    """(model_id, logits, logits of the export, greedy text) of each (path, target, layout), in a process of its own."""
    torch.save(given(), tmp_path / "given.pt")
    run(outside, "-c", SHOW, *(str(word) for export in exports for word in export), cwd=tmp_path)
    return torch.load(tmp_path / "shown.pt", weights_only=True)


def test_decoder_and_encoder_from_outside_equal_transformers(outside, theirs, folder, tmp_path):
    export = tmp_path / "export"
    ((model_id, logits, again, text),) = shown(outside, tmp_path, (folder, export, "llava-hf"))
    ids, pixels = given()
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=pixels).logits
    assert model_id == "llava"
    close(logits, wanted)
    assert torch.equal(again, logits)
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = ({"input_ids": ids[:1], "pixel_values": pixels[:1]}, {"input_ids": ids[1:, 21:]})
    for row, found in zip(rows, text, strict=True):
        answer = theirs.generate(**row, attention_mask=torch.ones_like(row["input_ids"]), **options)
        assert answer[0, row["input_ids"].shape[1] :].tolist() == found
    read, report = transformers.LlavaForConditionalGeneration.from_pretrained(export, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        close(read.eval()(input_ids=ids, pixel_values=pixels).logits, wanted, 0)


def test_projector_and_family_from_outside(outside, theirs, normed, tmp_path):
    export, ours, back = (tmp_path / name for name in ("export", "ours", "back"))
    exports = (normed, export, "norm_llava"), (normed, ours, "mindspeed-mm"), (ours, back, "norm_llava")
    found = shown(outside, tmp_path, *exports)
    logits = found[0][1]
    assert [model_id for model_id, *_ in found] == ["norm_llava"] * 3
    assert all(torch.equal(own, logits) and torch.equal(again, logits) for _, own, again, _ in found)
    saved, wanted = (load_file(path / "model.safetensors") for path in (export, normed))
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)
    ids, pixels = given()
    norm = torch.nn.LayerNorm(32)
    norm.load_state_dict({kind: wanted[f"connector.norm.{kind}"] for kind in ("weight", "bias")})
    with torch.no_grad():
        features = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        features = theirs.model.multi_modal_projector(norm(features))
        embedded = theirs.get_input_embeddings()(ids)
        embedded[ids == IMAGE_ID] = features.flatten(0, 1)
        close(logits, theirs.lm_head(theirs.model.language_model(inputs_embeds=embedded).last_hidden_state))


TRAIN = (
    "--objective focal --lr 1e-2 --lr-decay-style constant --train-iters 4 --micro-batch-size 2 --global-batch-size 4 "
    "--seq-length 128 --log-interval 1 --num-workers 0 --device cpu --seed 3"
)


def test_a_run_of_everything_from_outside(outside, normed, golden, tmp_path):
    """`config init`, then `train` with the page's data file, template and objective, then generation from the run."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    records = [{"ask": "What is it?", "say": "A dog."}, {"file": "red.png", "ask": "Is it red?", "say": "Yes."}] * 4
    (tmp_path / "records.json").write_text(json.dumps(records))
    parts = {
        "dataset_type": "captions",
        "basic_parameters": {"data_path": str(tmp_path / "records.json"), "data_folder": str(tmp_path)},
        "preprocess_parameters": {"image_processer_path": str(normed), "pad2square": False},
        "template_name": "ask",
        "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
    }
    (tmp_path / "data.json").write_text(json.dumps({"dataset_param": parts}))
    command = ("-m", "mindspeed_mm")
    (tmp_path / "model.json").write_text(run(outside, *command, "config", "init", str(normed), cwd=tmp_path))
    model = json.loads((tmp_path / "model.json").read_text())
    assert model["model_id"] == "norm_llava" and model["text_decoder"]["model_id"] == "seed_oss"
    files = ("--mm-model", "model.json", "--mm-data", "data.json", "--save", "save")
    run(outside, *command, "train", *files, *TRAIN.split(), cwd=tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "save/metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 4 and losses[-1] < losses[0]
    script = 'import mindspeed_mm as mm; print(mm.load("save", device="cpu").spec.model_id)'
    assert run(outside, "-c", script, cwd=tmp_path).split()[-1] == "norm_llava"


SCORE = """
import mindspeed_mm as mm
from evaluation.benchmarks import known_benchmarks

assert "windows_test" in known_benchmarks() and "pope" in known_benchmarks()
answers = [{"index": 0, "prediction": "Yes, it is."}, {"index": 1, "prediction": "yes"}]
print(mm.score("windows", answers, "table.tsv").table)
"""


def test_a_benchmark_from_outside(outside, tmp_path):
    rows = [{"index": "0", "question": "Is it open?", "answer": "Yes"}, {"index": "1", "answer": "No"}]
    write_table(tmp_path / "table.tsv", [{"question": "Is it shut?"} | row | {"image": image_cell()} for row in rows])
    table = ast.literal_eval(run(outside, "-c", SCORE, cwd=tmp_path).splitlines()[-1])
    assert 0.5 in next(iter(table.values())).values() or 50.0 in next(iter(table.values())).values()


def test_every_block_of_the_page_is_used():
    names = [name for _, name, _ in BLOCK.findall(PAGE.read_text())]
    assert len(names) == len(set(names)) == PAGE.read_text().count("```python") + PAGE.read_text().count("```json")


NEAREST = """
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.part import part_for_model_type

try:
    part_for_model_type("text_decoder", "seed_os")
except ConfigError as error:
    print(error)
"""


def test_the_nearest_names_are_those_of_all_packages(outside, tmp_path):
    assert "the nearest are seed_oss" in run(outside, "-c", NEAREST, cwd=tmp_path)
