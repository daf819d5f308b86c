"""InstructBLIP against transformers' classes: the question goes to the Q-Former, too."""

from dataclasses import replace

import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.encode import encode_prompt
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.families.instructblip import INSTRUCTBLIP
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import find_family
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_blip import instructblip, question_words, save, square_processor
from tests.helpers.tiny_families import asked
from tests.helpers.tiny_llava import SIZES, close, image, inputs, sample, their_loss
from tests.helpers.vlm_ranks import ADAM, GRADIENT, STEP, compare, stored, train, trained

FAMILY = find_family("instructblip")


@pytest.fixture(scope="module", params=["llama", "opt"])
def pair(request, tmp_path_factory):
    """(transformers' model, ours, the folder)."""
    theirs = instructblip(request.param)
    folder = save(theirs, tmp_path_factory.mktemp("instructblip"))
    return theirs, mm.load(folder, device="cpu"), folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(transformers' model, its folder, our spec)."""
    theirs = instructblip()
    folder = save(theirs, tmp_path_factory.mktemp("base"))
    return theirs, folder, describe_model(open_source(folder))


def greedy(theirs, given):
    ids = theirs.generate(
        **given,
        attention_mask=torch.ones_like(given["input_ids"]),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ids[0, -9:].tolist()


def test_logits(pair):
    theirs, ours, _ = pair
    encoded = asked(sample(ours.media, [image(*size) for size in SIZES], (7, 3, 1, 4, 5)))
    own = inputs(FAMILY, ours.spec, encoded)
    assert own["qformer_attention_mask"].sum(1).tolist() == [2, 3, 4, 5]
    with torch.no_grad():
        found = ours.logits(**own)
        close(found, theirs(**own).logits)
        other = own | {"qformer_input_ids": own["qformer_input_ids"].flip(0)}
        assert not torch.allclose(ours.logits(**other), found, atol=1e-3)


def test_greedy_text(pair):
    theirs, ours, _ = pair
    shown = [image(30, 50), image(90, 20)]
    rows = [asked(sample(ours.media, shown[:count], (5,) * (count + 1), seed=count)) for count in (2, 1)]
    wanted = [greedy(theirs, inputs(FAMILY, ours.spec, row)) for row in rows]
    questions = [item.instructions[0] for row in rows for item in row.media]
    options = {"max_new_tokens": 9, "eos_token_id": -1}
    ids = [row.input_ids for row in rows]
    assert ours.generate(input_ids=ids[0], images=shown, qformer_input_ids=questions[:2], **options) == wanted[:1]
    found = ours.generate(input_ids=ids, images=[*shown, shown[0]], qformer_input_ids=questions, **options)
    assert found == wanted


def test_the_question_of_a_prompt_goes_to_the_qformer(pair):
    """The answer to a prompt is that of its ids with the same question in the Q-Former's words."""
    _, ours, _ = pair
    text, shown = "w7 w9 w8", image(30, 50)
    ids = encode_prompt([("<image>\n" + text, None)], ours.tokenizer, "instructblip")
    question = question_words()(text)["input_ids"]
    assert question == [2, 7, 9, 8, 3] and list(ours.media.instruction(text)) == question
    options = {"max_new_tokens": 6, "eos_token_id": -1}
    wanted = ours.generate(input_ids=ids, images=[shown], qformer_input_ids=[question], **options)
    for prompt in (text, "<image>\n" + text):
        assert ours.generate(prompt, [shown], **options) == [ours.tokenizer.decode(wanted[0]).strip()]


def test_export_is_read_by_transformers(pair, tmp_path):
    theirs, ours, folder = pair
    mm.convert(folder, tmp_path / "ours", to="mindspeed-mm")
    mm.convert(tmp_path / "ours", tmp_path / "checkpoint", to="checkpoint")
    mm.convert(tmp_path / "checkpoint", tmp_path / "out", to="instructblip")
    again, report = transformers.InstructBlipForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    own = inputs(FAMILY, ours.spec, asked(sample(ours.media, [image(30, 50)], (5, 6))))
    loaded = mm.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        close(again.eval()(**own).logits, theirs(**own).logits, 0)
        close(loaded.logits(**own), theirs(**own).logits)
    assert loaded.media.instruction("w9") == (2, 9, 3)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "qformer_tokenizer")
    assert words("w9")["input_ids"] == [2, 9, 3]


# --- Training ------------------------------------------------------------------------------------------------------


def samples_of(spec):
    """Two images, then one."""
    media = FAMILY.media_processor(spec, square_processor().to_dict())
    return [
        asked(sample(media, [image(30, 50), image(90, 20)], (6, 9, 5), seed=1)),
        asked(sample(media, [image(1, 7)], (4, 12), seed=9)),
    ]


LAYOUTS = {
    "one rank": GoldenLayout(),
    "packed": GoldenLayout(packed=True),
    "TP2 SP packed": GoldenLayout(tensor=2, flags="--sequence-parallel", packed=True),
    "CP2 packed": GoldenLayout(context=2, packed=True),
    "TP2 PP2": GoldenLayout(tensor=2, pipeline=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients(base, ranks, name, tmp_path):
    theirs, folder, spec = base
    samples = samples_of(spec)
    theirs.zero_grad()
    their_loss(theirs, FAMILY, spec, samples).backward()
    names = stored(theirs, INSTRUCTBLIP)
    wanted = {key: tensor.grad for key, tensor in names.items() if tensor.grad is not None and tensor.grad.any()}
    ranks(LAYOUTS[name].ranks).run(train, str(folder), LAYOUTS[name], samples, str(tmp_path), 1, GRADIENT)
    after = trained(tmp_path, spec, INSTRUCTBLIP)
    # Words behind the last layer are not looked at.
    assert all(torch.equal(after.pop(key), names[key]) for key in names if key not in wanted)
    changes = {key: (names[key].detach() - tensor[: len(names[key])]) / STEP for key, tensor in after.items()}
    compare(changes, wanted)


@pytest.mark.parametrize("name", ["one rank", pytest.param("TP2 PP2", marks=pytest.mark.slow)])
def test_five_steps(base, ranks, name, tmp_path):
    _, folder, spec = base
    theirs = transformers.InstructBlipForConditionalGeneration.from_pretrained(folder).float().eval()
    samples = samples_of(spec)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        their_loss(theirs, FAMILY, spec, samples).backward()
        optimizer.step()
    ranks(LAYOUTS[name].ranks).run(train, str(folder), LAYOUTS[name], samples, str(tmp_path), 5, ADAM)
    compare(trained(tmp_path, spec, INSTRUCTBLIP), stored(theirs, INSTRUCTBLIP))


# --- Bad input -----------------------------------------------------------------------------------------------------


def test_questions_that_do_not_fit_are_refused(base, pair):
    spec, ours = base[2], pair[1]
    pixels = torch.zeros(2, 3, 28, 28)

    def refused(message, error=ConfigError, **given):
        with pytest.raises(error, match=message):
            FAMILY.media_of_inputs(spec, given)

    ids = torch.tensor([[4, 5]])
    refused("takes pixel_values and qformer_input_ids together", qformer_input_ids=ids)
    refused("one question for each image", pixel_values=pixels, qformer_input_ids=ids)
    with pytest.raises(DataError, match=r"1 images came with instructions of \[\] words"):
        ours.logits(torch.tensor([[IMAGE_TOKEN_INDEX] * 5 + [4]]), pixel_values=pixels[:1])
    with pytest.raises(ConfigError, match="found qformer_input_ids for 0 images; expected 1"):
        ours.generate(input_ids=[IMAGE_TOKEN_INDEX, 4], images=[image(3, 3)], max_new_tokens=1)
    with pytest.raises(DataError, match="question of 63 words of the Q-Former; expected 1 to 60"):
        ours.media.instruction("w4 " * 61)
    plain = FAMILY.media_processor(spec, square_processor().to_dict())
    with pytest.raises(ConfigError, match="came without the tokenizer of its Q-Former"):
        plain.instruction("w4")


def test_a_feature_cache_is_refused(pair):
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.trainer.caching_step import check_cachable

    with pytest.raises(ConfigError, match="does not know the question about an image"):
        check_cachable(pair[1].spec, Runtime(), pair[1].media)


def test_media_keep_their_questions():
    one, two = (replace(Media.of_images(torch.zeros(1, 3, 2, 2)), instructions=((n,),)) for n in (4, 5))
    assert Media.join([one, two]).instructions == ((4,), (5,))
