"""Folders of tiny Flamingo models: the goldens of open_flamingo around a random CLIP of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from tests.helpers.reference import DATA
from tests.helpers.tiny_llava import clip, fixed_processor, randomised

GOLDEN = DATA / "golden_flamingo"
CASES = ("llama_every1_latest", "llama_every2_all", "mpt_every1_latest", "mpt_every2_all")
SIDE = 21
MEDIA, END, ANSWER = 97, 98, 96


def meta_of(case: str) -> dict:
    meta = json.loads((GOLDEN / "meta.json").read_text())[case]
    # The config says 2, which transformers does not look at: its MPT is four times as wide inside.
    meta["lm"] |= {"expansion_ratio": 4} if case.startswith("mpt") else {}
    return meta


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 99 words, the last ones those of Flamingo."""
    names = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, ANSWER))]
    names += ["<answer>", "<image>", "<|endofchunk|>"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=names[-3:]
    )


def letters(rows: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single characters, which gives back every text of them; the last rows are Flamingo's words."""
    characters = ["\n", *map(chr, range(32, 127))]
    names = ["<unk>", "<s>", "</s>", *characters]
    names += [f"<{number}>" for number in range(len(names), rows - 3)] + ["<|endofchunk|>", "<answer>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=names[-3:]
    )


def encoder(folder: Path) -> transformers.CLIPVisionModel:
    """A vision encoder as wide as the goldens' features, saved in a folder with its image processor."""
    model = randomised(transformers.CLIPVisionModel(clip(hidden_size=40, image_size=SIDE, num_attention_heads=4)))
    model.save_pretrained(folder)
    fixed_processor("clip", SIDE).save_pretrained(folder)
    return model


def golden_folder(case: str, folder: Path, *, every: int | None = None, **config) -> Path:
    """A folder of a case's whole state dict; the vision encoder is `encoder`, in a folder inside."""
    meta = meta_of(case)
    folder.mkdir(exist_ok=True)
    encoder(folder / "clip")
    state = load_file(GOLDEN / f"{case}.weights.safetensors")
    torch.save(state, folder / "checkpoint.pt")
    own = {
        "model_type": "flamingo",
        "text_config": meta["lm"],
        "cross_attn_every_n_layers": meta["cross_attn_every_n_layers"] if every is None else every,
        "only_attend_immediate_media": meta["only_attend_immediate_media"],
        "vision_encoder_path": "clip",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(own))
    words().save_pretrained(folder)
    return folder


def trained_folder(case: str, folder: Path, wrapper: str | None = None) -> Path:
    """The same as it is published: trained keys alone, wrapped or not, and the decoder in a folder of its own."""
    golden_folder(case, folder, lang_encoder_path="decoder")
    meta, state = meta_of(case), torch.load(folder / "checkpoint.pt", weights_only=True)
    copies = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")
    trained = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith("perceiver.")
        or ("gated_cross_attn_layer." in name and not name.startswith(copies))
        or name.endswith(("embed_tokens.weight", "wte.weight"))
    }
    base = {
        name.removeprefix("lang_encoder.").replace("decoder_layer.", ""): tensor.clone()
        for name, tensor in state.items()
        if name.startswith("lang_encoder.") and not name.startswith(copies) and "gated_cross" not in name
    }
    # Words before training, and fewer of them, as in a decoder's own folder.
    for name in base:
        if name.endswith(("embed_tokens.weight", "wte.weight")):
            base[name] = torch.zeros_like(base[name])
    if case.startswith("mpt"):
        del base["lm_head.weight"]
    (folder / "decoder").mkdir()
    save_file(base, folder / "decoder/model.safetensors")
    (folder / "decoder/config.json").write_text(json.dumps(meta["lm"]))
    torch.save(trained if wrapper is None else {wrapper: trained, "epoch": 3}, folder / "checkpoint.pt")
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def golden_case(case: str) -> dict[str, torch.Tensor]:
    """ids [B, S] with placeholders, features [I * P, W] in reading order, logits [B, S, V]."""
    tensors = load_file(GOLDEN / f"{case}.case.safetensors")
    ids = tensors["input_ids"]
    ids = ids.masked_fill(ids == MEDIA, IMAGE_TOKEN_INDEX)
    features = tensors["features"].flatten(0, 2).flatten(2).transpose(1, 2)
    return {"ids": ids, "features": features, "logits": tensors["logits"]}
