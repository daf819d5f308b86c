"""The reference data of tests/data, made whole: what another file holds was left out there and is made again here.

tests/data/README.md says where the values come from. Nothing is written into tests/data; `manifest.json` there lists
what each folder looks like once it is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parents[1] / "data"
FOLDERS = ("golden", "golden_eval", "golden_flamingo", "cases")

# Copies of the file on the left, byte by byte.
COPIES = {
    "tokenizer/tokenizer.model": (
        "tokenizer_chatml/tokenizer.model",
        "models/llava_hf/tokenizer.model",
        "models/llava_original/tokenizer.model",
        "models/vicuna/tokenizer.model",
        "models/vicuna_bin/tokenizer.model",
    ),
    "tokenizer/tokenizer.json": ("models/vicuna/tokenizer.json",),
    "models/clip_hf/preprocessor_config.json": ("models/llava_hf/preprocessor_config.json",),
}
# Modules of a block that open_flamingo keeps in a list as well.
FLAMINGO_GROUPS = {"decoder_layer.": "old_decoder_blocks", "gated_cross_attn_layer.": "gated_cross_attn_layers"}
VOCABULARY = 1000  # rows of the two vocabulary matrices everywhere but in llava_hf, which pads them to 1024

Tensors = dict[str, torch.Tensor]


def golden(target: Path) -> Path:
    """tests/data/golden as it was made, every layout of models/ included, in the folder `target`, which is returned."""
    shutil.copytree(DATA / "golden", target, copy_function=shutil.copyfile)
    for source, copies in COPIES.items():
        for copy in copies:
            shutil.copyfile(target / source, target / copy)
    models = target / "models"
    stored = load_file(models / "weights.safetensors")
    (models / "weights.safetensors").unlink()
    hub = {name: tensor.float() for name, tensor in stored.items()}
    clip = _under("vision_tower.", hub)
    _write_safetensors(models / "llava_hf", hub)
    save_file(clip, models / "clip_hf" / "model.safetensors", {"format": "pt"})
    decoder = _decoder(stored)
    save_file(decoder, models / "vicuna" / "model.safetensors", {"format": "pt"})
    # What transformers kept in files until 4.31: a buffer, in the dtype of the model.
    frequencies = (1.0 / 10000 ** (torch.arange(0, 16, 2).float() / 16)).half()
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies.clone() for layer in range(4)}
    _write_bin(models / "vicuna_bin", decoder | buffers)
    projector = _projector(stored)
    torch.save(projector, models / "mm_projector.bin")
    vision = {f"model.vision_tower.vision_tower.{name}": value.half() for name, value in clip.items()}
    _write_bin(models / "llava_original", decoder | vision | projector)
    return target


def golden_flamingo(target: Path) -> Path:
    """tests/data/golden_flamingo with each weight under every name that open_flamingo saves, in `target`."""
    shutil.copytree(DATA / "golden_flamingo", target, copy_function=shutil.copyfile)
    for path in target.glob("*.weights.safetensors"):
        tensors = load_file(path)
        for name, value in list(tensors.items()):
            for alias in flamingo_aliases(name):
                tensors[alias] = value.clone()
        save_file(tensors, path)
    return target


def flamingo_aliases(name: str) -> list[str]:
    """The second name under which open_flamingo's state dict holds the tensor `name`; empty where it has one name."""
    block = re.match(r"lang_encoder\.(?:model\.layers|transformer\.blocks)\.(\d+)\.", name)
    if block is None:
        return []
    rest = name[block.end() :]
    for part, group in (
        ("decoder_layer.", "old_decoder_blocks"),
        ("gated_cross_attn_layer.", "gated_cross_attn_layers"),
    ):
        if rest.startswith(part):
            return [f"lang_encoder.{group}.{block[1]}.{rest.removeprefix(part)}"]
    return []


def digest(path: Path) -> str:
    """sha256 of a file, or of the names, dtypes, shapes and bytes of the tensors in a file of weights that is made.

    Other versions of torch and safetensors may write the same tensors as other bytes.
    """
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    elif path.suffix == ".bin":
        tensors = torch.load(path, weights_only=True)
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes())
    return found.hexdigest()


def snapshot() -> dict[str, tuple[int, int]]:
    """Size and time of change (ns) of every reference file: equal before and after the tests."""
    files = [path for folder in FOLDERS for path in (DATA / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(DATA)): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)}


def _decoder(stored: Tensors) -> Tensors:
    """The language model under its own names, without the rows that only llava_hf has."""
    padded = ("lm_head.weight", "model.embed_tokens.weight")
    decoder = _under("language_model.", stored)
    return {name: value[:VOCABULARY].clone() if name in padded else value for name, value in decoder.items()}


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _projector(stored: Tensors) -> Tensors:
    places = {"linear_1": 0, "linear_2": 2}
    return {
        f"model.mm_projector.{place}.{kind}": stored[f"multi_modal_projector.{linear}.{kind}"]
        for linear, place in places.items()
        for kind in ("weight", "bias")
    }


def _shards(index: Path, tensors: Tensors) -> dict[str, Tensors]:
    """Shard name -> its tensors, as the index file says."""
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shards: dict[str, Tensors] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, {})[name] = tensors[name]
    return shards


def _write_safetensors(folder: Path, tensors: Tensors) -> None:
    for shard, own in _shards(folder / "model.safetensors.index.json", tensors).items():
        save_file(own, folder / shard, {"format": "pt"})


def _write_bin(folder: Path, tensors: Tensors) -> None:
    for shard, own in _shards(folder / "pytorch_model.bin.index.json", tensors).items():
        torch.save(own, folder / shard)
