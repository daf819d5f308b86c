"""Shikra's 1,007 words as tokens of a model: mean rows, every layout, stock transformers, text and back."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mindspeed_mm as mm
from checkpoint_converters.box_tokens import WORDS
from checkpoint_converters.convert import convert
from mindspeed_mm.data.grounding.notation import notation
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.errors import WeightError
from tests.checkpoint_converters.converter_helpers import tensors, write_llava

BOX = [0.25, 0.5, 0.75, 1.0]
TEXT = f"Answer: {notation('bins').format([BOX])} ."


def matrices(folder):
    """{name: matrix} of the embedding and the head of a folder."""
    found = {name[1]: value for name, value in tensors(folder).items()}
    return {name: value for name, value in found.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))}


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_the_mean_and_survive_every_layout(golden, tmp_path, tied):
    source = write_llava(tmp_path / "source", golden, text={"tie_word_embeddings": tied})
    first = load_tokenizer(source).vocab_size
    convert(source, tmp_path / "llava", to="llava", box_tokens=True)
    for name, before in matrices(source).items():
        after = matrices(tmp_path / "llava")[name]
        assert after.shape[0] == max(before.shape[0], first + 1007)
        assert torch.equal(after[:first], before[:first])
        assert torch.equal(after[first : first + 1007], before[:first].mean(0).expand(1007, -1))
    layouts = ("llava-hf", "mindspeed-mm", "llava")
    for earlier, to in zip(("llava", *layouts), layouts, strict=False):
        convert(tmp_path / earlier, tmp_path / f"{to}-again" if to == "llava" else tmp_path / to, to=to)
    back = matrices(tmp_path / "llava-again")
    assert all(torch.equal(back[name], value) for name, value in matrices(tmp_path / "llava").items())
    for folder in ("llava", "llava-hf", "mindspeed-mm", "llava-again"):
        tokenizer = load_tokenizer(tmp_path / folder)
        ids = tokenizer.encode(TEXT)
        assert [tokenizer.token_to_id(word) for word in WORDS] == list(range(first, first + 1007))
        assert sum(first <= number < first + 1007 for number in ids) == 6
        # They are no control tokens: what decodes an answer keeps them.
        assert notation("bins").parse(tokenizer.decode(ids)) == [[BOX]]


def test_stock_transformers_reads_the_words_and_gives_equal_logits(golden, tmp_path):
    import transformers

    convert(golden / "models" / "llava_original", tmp_path / "boxes", to="llava-hf", dtype="fp32", box_tokens=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "boxes")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert notation("bins").parse(tokenizer.decode(ids[0], skip_special_tokens=True)) == [[BOX]]
    assert tokenizer.convert_tokens_to_ids(list(WORDS)) == list(range(1000, 2007))
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "boxes", dtype=torch.float32)
    ours = mm.load(tmp_path / "boxes", device="cpu", dtype="fp32")
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    assert torch.allclose(ours.logits(ids, None, None)[..., :2007], expected[..., :2007], atol=2e-5)
    # The words that nobody has trained score as the mean of all others (stored in 16 bits, so rounded).
    assert torch.allclose(expected[..., 1000], expected[..., :1000].mean(-1), atol=1e-3)


def test_decoders_and_layouts_without_tokenizer(golden, tmp_path):
    convert(golden / "models" / "llava_original", tmp_path / "decoder", to="hf", box_tokens=True)
    config = json.loads((tmp_path / "decoder" / "config.json").read_text())
    assert config["vocab_size"] == 2007
    stored = load_file(next((tmp_path / "decoder").glob("*.safetensors")))
    assert stored["model.embed_tokens.weight"].shape[0] == stored["lm_head.weight"].shape[0] == 2007


def test_what_cannot_get_the_words(golden, tmp_path):
    source = golden / "models" / "llava_original"
    with pytest.raises(WeightError, match="box tokens belong to a text decoder and its tokenizer"):
        convert(source, tmp_path / "out", to="clip", box_tokens=True)
    convert(source, tmp_path / "boxes", to="hf", box_tokens=True)
    with pytest.raises(WeightError, match="has 1007 of the words already"):
        convert(tmp_path / "boxes", tmp_path / "again", to="hf", box_tokens=True)
    with pytest.raises(
        WeightError, match=r"has ids up to 2006, and the text decoder 1000 rows; expected at least 2007"
    ):
        convert(source, tmp_path / "out", to="llava", tokenizer=_without_first(tmp_path), box_tokens=True)
    with pytest.raises(WeightError, match="peft: found box_tokens"):
        convert(source, tmp_path / "out", to="peft", box_tokens=True)


def _without_first(tmp_path):
    """A tokenizer with 1,007 words of other names."""
    folder = tmp_path / "other"
    folder.mkdir()
    for path in (tmp_path / "boxes").glob("*token*"):
        text = path.read_bytes()
        if path.suffix == ".json":
            text = text.replace(b"<b_", b"<c_").replace(b"<p_", b"<q_").replace(b"<bin_", b"<other_")
        (folder / path.name).write_bytes(text)
    return folder
