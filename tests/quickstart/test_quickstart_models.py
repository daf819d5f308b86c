"""The toy's models and tokenizer have the public forms, and no token hides an answer."""

import json

import pytest
import sentencepiece

from examples.quickstart.configs import lora_config, write_configs
from examples.quickstart.make_data import LETTERS, NAMES, choice_question, make_data
from examples.quickstart.make_models import make_models
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.encode import encode, encode_prompt
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import load_model_spec


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_data(folder / "data", questions_per_digit=4)
    sizes = make_models(folder / "models", folder / "data", seed=7)
    write_configs(folder / "configs", folder / "data", folder / "models", folder / "converted", sizes["vocabulary"])
    return folder, sizes


def test_sizes(made):
    _, sizes = made
    assert sizes["vicuna parameters"] + sizes["clip parameters"] < 1_500_000


def test_folders_are_read_as_public_layouts(made):
    folder, _ = made
    assert open_source(folder / "models" / "clip").layout == "clip"
    assert open_source(folder / "models" / "vicuna").layout == "hf"


def test_same_models_every_time(made, tmp_path):
    folder, _ = made
    make_models(tmp_path, folder / "data", seed=7)
    for name in ("clip/model.safetensors", "vicuna/model.safetensors", "vicuna/tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (folder / "models" / name).read_bytes()


def test_configs_are_accepted(made):
    folder, sizes = made
    spec = load_model_spec(folder / "configs" / "model.json")
    assert spec.text_decoder.language_vocab_size == sizes["vocabulary"]
    assert not any(part.freeze for part in spec.part_specs().values())
    lora = load_model_spec(lora_config(json.loads((folder / "configs" / "model.json").read_text()), folder / "stage2"))
    assert [part.trains for part in lora.part_specs().values()] == [True, False, False] and lora.text_decoder.lora
    files = (("data_pretrain.json", "plain"), ("data_finetune.json", "v1"), ("data_parity.json", "v1"))
    for name, template in files:
        assert DataConfig.load(folder / "configs" / name).dataset_param.template_name == template


def test_a_letter_is_one_token_and_prompts_are_short(made):
    tokenizer = load_tokenizer(made[0] / "models" / "vicuna")
    question = choice_question("Which digit is shown?", dict(zip(LETTERS, NAMES, strict=False)))
    prompt = encode_prompt([(f"<image>\n{question}", None)], tokenizer, "v1")
    assert len(prompt) < 30
    for letter in LETTERS:
        ids, labels = encode(
            [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": letter}], tokenizer, "v1"
        )
        supervised = [token for token in labels if token != -100]
        assert ids[: len(prompt)] == prompt and len(supervised) == 2
        assert tokenizer.decode(supervised[:1]).strip() == letter


def test_no_piece_spans_a_question_and_its_answer(made):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(made[0] / "models" / "vicuna" / "tokenizer.model"))
    for number in range(pieces.vocab_size()):
        piece = pieces.id_to_piece(number)
        assert not ("ASSISTANT:" in piece and piece.split("ASSISTANT:")[1]), piece
        assert sum(f"{letter}." in piece for letter in LETTERS) < 2, piece


def test_conversations_fit_the_sequence_length(made):
    folder, _ = made
    tokenizer = load_tokenizer(folder / "models" / "vicuna")
    records = json.loads((folder / "data" / "stage2.json").read_text(encoding="utf-8"))[:100]
    assert max(len(encode(record, tokenizer, "v1")[0]) for record in records) + 15 <= 256
