"""Training of Flamingo models: what moves, five steps beside plain torch, and rows of single words."""

import copy
import re

import pytest
import torch

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.adapters.targets import sites
from mindspeed_mm.models.part import find_part
from mindspeed_mm.models.spec import load_model_spec, model_block
from tests.helpers.golden_training import GoldenLayout, full_tensors
from tests.helpers.tiny_families import make_family
from tests.helpers.vlm_ranks import ADAM, GRADIENT, STEP, compare, stored, train, trained

WORDS = "embedding.word_embeddings.weight"
ROWS = [128, 129, 130]
RECIPE = [
    {"names": "decoder.layers.*.gated_cross.*", "freeze": False},
    {"names": WORDS, "freeze": False, "rows": ROWS},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_family("flamingo", tmp_path_factory.mktemp("flamingo"))


def recipe(base, **rule) -> dict:
    """The usual training: perceiver, cross-attention and the rows of special words."""
    model = model_block(base.spec.part_specs(), "flamingo")
    model["text_decoder"] |= {"freeze": True, "parameters": [RECIPE[0], RECIPE[1] | rule]}
    model["image_encoder"]["vision_encoder"]["freeze"] = True
    return model


@pytest.mark.parametrize("layout", [GoldenLayout(), GoldenLayout(tensor=2, pipeline=2)], ids=["one rank", "TP2 PP2"])
def test_five_steps_of_the_usual_recipe(base, ranks, layout, tmp_path):
    theirs, samples = copy.deepcopy(base.theirs), base.rows((2, 0, 1))
    moving = []
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(bool(re.search(r"^perceiver|gated_cross_attn|embed_tokens", name)))
        if parameter.requires_grad:
            moving.append(parameter)
    words = theirs.lang_encoder.get_input_embeddings().weight
    optimizer = torch.optim.AdamW(
        [
            {"params": [x for x in moving if x is not words], "weight_decay": 0.1},
            {"params": [words], "weight_decay": 0},
        ],
        lr=1e-3,
    )
    for group in list(optimizer.param_groups):  # vectors, as in Megatron, do not decay
        flat = [x for x in group["params"] if x.dim() == 1]
        group["params"] = [x for x in group["params"] if x.dim() > 1]
        if flat:
            optimizer.add_param_group({"params": flat, "weight_decay": 0})
    mask = torch.zeros(len(words), 1)
    mask[ROWS] = 1
    copied = copy.copy(base)
    object.__setattr__(copied, "theirs", theirs)
    for _ in range(5):
        optimizer.zero_grad()
        copied.their_loss(samples).backward()
        words.grad *= mask
        optimizer.step()
    ranks(layout.ranks).run(
        train, str(base.folder), layout, samples, str(tmp_path), 5, f"{ADAM} --weight-decay 0.1", recipe(base)
    )
    found = trained(tmp_path, load_model_spec(recipe(base)), base.names)
    compare(found, stored(theirs, base.names))
    rows = found["lang_encoder.model.embed_tokens.weight"]
    first = base.theirs.lang_encoder.get_input_embeddings().weight
    same = (rows[: len(first)] == first).all(dim=1)
    assert same[:128].all() and not same[130]


LORA = {"r": 3, "alpha": 6, "target_modules": ["o_proj", "down_proj"]}


@pytest.mark.parametrize(
    "layout", [GoldenLayout(packed=True), GoldenLayout(tensor=2, pipeline=2)], ids=["packed", "TP2 PP2"]
)
def test_lora_in_the_decoder(base, ranks, layout, tmp_path):
    """B has the weight's gradient times A, perceiver and cross-attention have their own, and nothing else moves."""
    model = recipe(base)
    model["text_decoder"] |= {"freeze": False, "lora": LORA}
    samples = base.rows((2, 0, 1))
    base.theirs.zero_grad(set_to_none=True)
    base.their_loss(samples).backward()
    ranks(layout.ranks).run(train, str(base.folder), layout, samples, str(tmp_path), 1, GRADIENT, model)
    found, theirs = full_tensors(tmp_path), dict(base.theirs.named_parameters())
    spec = load_model_spec(model)
    for site in sites(find_part("text_decoder", "llama"), spec.text_decoder):
        name = re.sub(r"(layers\.\d+)\.", r"\1.decoder_layer.", f"lang_encoder.{site.module}.weight")
        own = f"text_decoder.{site.owner}.lora.{site.short}"
        wanted = 2 * theirs[name].grad @ found[f"{own}.a"].t()
        assert (found[f"{own}.b"] / -STEP - wanted).norm() < 1e-4 * wanted.norm(), name
        assert torch.equal(found[f"text_decoder.{site.owner}.weight"], theirs[name].detach()), name
    kept = found["text_decoder.decoder.layers.3.gated_cross.linear_proj.weight"]
    cross = theirs["lang_encoder.model.layers.3.gated_cross_attn_layer.attn.to_out.weight"]
    for tensor, other in ((kept, cross), (found["image_encoder.projector.latents"], theirs["perceiver.latents"])):
        assert ((other.detach() - tensor) / STEP - other.grad).norm() < 1e-4 * other.grad.norm()


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"rows": [131]}, r"parameters\[1\].rows: found 131; expected token ids below 131"),
        ({"rows": [5], "freeze": None}, r"found rows \[5\] with freeze none"),
        ({"rows": [5], "weight_decay": 0.1}, "and no weight_decay, which would move the other rows"),
        ({"rows": [5], "names": "decoder.*"}, r"rows: found for decoder.* expected .*word_embeddings"),
    ],
)
def test_rows_that_cannot_be_trained(base, rule, message):
    with pytest.raises(ConfigError, match=message):
        load_model_spec(recipe(base, **rule))
