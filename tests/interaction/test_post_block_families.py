"""The post-interaction block behind every decoder and in other families: the identity at the start, and answers from
the cache that are those of full recomputation, of the cross-attention and of the transformer block."""

import json
from dataclasses import replace

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import model_block
from tests.helpers.golden_training import records
from tests.helpers.tiny_decoders import FAMILIES, make, save
from tests.helpers.tiny_families import SHOWN, make_family
from tests.helpers.tiny_pairs import train_pairs, write_pairs
from tests.interaction.post_block_helpers import write_block
from tests.parallel.test_command import LAYOUTS

TEXT = {"cross_attention": False, "self_attention": True}
FORMS = {"cross": {}, "text": TEXT}
OTHERS = ("blip2", "instructblip", "llava_next", "minigpt4", "qwen2_5_vl")
TOKENS = 4


def greedy(vlm):
    """Options of generation; ids that stand for images, which a pass over an answer would take for such, never come."""
    never = {"bad_words_ids": [[token] for token in vlm._placeholders]} if vlm._placeholders else {}
    return {"max_new_tokens": TOKENS, "eos_token_id": -1} | never


def loaded(model, path, **block):
    """A model with a block."""
    path.write_text(json.dumps(model | {"interaction": block}))
    return mm.load(path, device="cpu")


def compared(vlm, scores, row):
    """Logits with the block and without it."""
    block = vlm.model.interaction
    found = [scores(vlm, *row)]
    vlm.model.interaction = None
    found.append(scores(vlm, *row))
    vlm.model.interaction = block
    return found


def check(model, path, rows, scores, generated):
    """A model with a block that is new computes what it does without; with one of random values it computes something
    else, and what it generates, with its cache, is what passes over everything before each token say.

    Args:
        rows: the ids of each prompt.
        scores: (model, number of a row, its ids) -> logits.
        generated: model -> the new ids of each row.
    """
    for form in FORMS.values():
        same = loaded(model, path, num_layers=2, **form)
        for row in enumerate(rows):
            assert torch.equal(*compared(same, scores, row))
        noisy = loaded(model, path, doubled_residual=True, init_method_std=0.3, **form)
        assert not torch.allclose(*compared(noisy, scores, (0, rows[0])), atol=0.1)
        found = [list(ids) for ids in rows]
        for number, ids in enumerate(found):
            for _ in range(TOKENS):
                last = scores(noisy, number, ids)[0, -1].clone()
                last[list(noisy._placeholders)] = -torch.inf
                ids.append(int(last.argmax()))
        assert generated(noisy) == [ids[-TOKENS:] for ids in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_decoders(name, tmp_path):
    model = json.loads(save(make(name), name, tmp_path).read_text())
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 131, (30,), generator=generator).tolist()
    pixels = torch.randn(3, 3, 28, 28, generator=generator)
    shown = [-200] * 4
    rows = [[*words[:5], *shown, *words[5:9]], [*shown, *words[9:12], *shown, words[12]], words[13:20]]
    images = [pixels[:1], pixels[1:], None]

    def scores(vlm, number, ids):
        return vlm.logits(torch.tensor([ids]), pixel_values=images[number])

    def generated(vlm):
        return vlm.generate(input_ids=rows, images=pixels, **greedy(vlm))

    check(model, tmp_path / "model.json", rows, scores, generated)


@pytest.mark.parametrize("name", OTHERS)
def test_families(name, tmp_path):
    family = make_family(name, tmp_path / "folder")
    model = model_block(family.spec.part_specs(), name)
    for block in (model["text_decoder"], *model["image_encoder"].values()):
        block["ckpt_path"] = str(family.folder)
    rows = family.rows((2, 0, 1))
    questions = [list(question) for row in rows for item in row.media for question in item.instructions or ()]
    asked = {"qformer_input_ids": questions} if questions else {}

    def scores(vlm, number, ids):
        given = family.inputs(family.family, vlm.spec, replace(rows[number], input_ids=ids))
        return vlm.logits(**given | {"input_ids": torch.tensor([ids])})

    def generated(vlm):
        images = [*SHOWN[:2], SHOWN[0]]
        return vlm.generate(input_ids=[row.input_ids for row in rows], images=images, **greedy(vlm), **asked)

    check(model, tmp_path / "model.json", [row.input_ids for row in rows], scores, generated)


def test_a_tied_head_of_another_decoder_over_stages(ranks, golden, tmp_path):
    """Preference training of decoder and block of a Qwen2, whose head is its embedding."""
    write_pairs(golden, tmp_path)
    sizes = {"hidden_size": 96, "intermediate_size": 176, "vocab_size": 1000, "max_position_embeddings": 512}
    make("qwen2", **sizes, num_hidden_layers=2).save_pretrained(tmp_path / "qwen2")
    text = describe_part(open_source(tmp_path / "qwen2").part("text_decoder"))
    model = json.loads((tmp_path / "model.json").read_text())
    own = {"model_id": "qwen2", "ckpt_path": str(tmp_path / "qwen2")}
    model["text_decoder"] = text.model_dump(mode="json", exclude_defaults=True) | own
    model["interaction"] = {"ckpt_path": str(write_block(tmp_path / "block.pt"))}
    (tmp_path / "model.json").write_text(json.dumps(model))
    assert ranks(1).run(train_pairs, str(tmp_path), "one", "--train-iters 2") == [0]
    assert ranks(2).run(train_pairs, str(tmp_path), "two", f"--train-iters 2 {LAYOUTS['PP2']}") == [0, 0]
    wanted, found = records(tmp_path / "one"), records(tmp_path / "two")
    assert text.share_embeddings_and_output_weights and wanted[1]["loss"] != wanted[0]["loss"]
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in wanted], rel=1e-4, abs=1e-7), key
