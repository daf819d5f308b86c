"""Tiny MiniGPT-4 models from transformers' parts, saved under MiniGPT-4's names."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.tiny_blip import QUERIES, blip2, square_processor
from tests.helpers.tiny_llava import words

VIT = {
    r"embeddings\.class_embedding": "cls_token",
    r"embeddings\.position_embedding": "pos_embed",
    r"embeddings\.patch_embedding\.": "patch_embed.proj.",
    r"encoder\.layers\.(\d+)\.layer_norm([12])\.": r"blocks.\1.norm\2.",
    r"encoder\.layers\.(\d+)\.self_attn\.projection\.": r"blocks.\1.attn.proj.",
    r"encoder\.layers\.(\d+)\.self_attn\.qkv\.": r"blocks.\1.attn.qkv.",
    r"encoder\.layers\.(\d+)\.mlp\.": r"blocks.\1.mlp.",
}
QFORMER = {
    r"^qformer\.layernorm\.": "Qformer.bert.embeddings.LayerNorm.",
    r"^qformer\.(encoder\.layer\.\d+\.(attention|crossattention)\.)attention\.": r"Qformer.bert.\1self.",
    r"^qformer\.": "Qformer.bert.",
    r"^language_projection\.": "llama_proj.",
    r"^vision_model\.post_layernorm\.": "ln_vision.",
}


def vit_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vision encoder of a Blip2 model under the names of eva_vit_g.pth."""
    found = {}
    for name, tensor in state.items():
        short = name.removeprefix("vision_model.")
        if short == name or short.startswith("post_layernorm."):
            continue
        for old, new in VIT.items():
            short = re.sub(old, new, short)
        if short.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            place = short.removesuffix("qkv.bias")
            found |= {place + "q_bias": query.clone(), place + "v_bias": value.clone()}
        else:
            found[short] = tensor.clone()
    return found


def bridge_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norm, queries, Q-Former and linear under the names of MiniGPT-4."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(("qformer.", "language_projection.", "query_tokens", "vision_model.post_layernorm.")):
            for old, new in QFORMER.items():
                name = re.sub(old, new, name)
            found[name] = tensor.clone()
    return found


def text_config(model) -> dict:
    return json.loads(model.config.text_config.to_json_string(use_diff=False))


def save(folder: Path, model, tensors: dict[str, torch.Tensor], **config) -> Path:
    """A whole model's folder: the decoder and vision encoder of a Blip2 model, the bridge as given."""
    state = model.state_dict()
    whole = {"visual_encoder." + name: tensor for name, tensor in vit_tensors(state).items()} | tensors
    whole |= {
        name.replace("language_model.", "llama_model."): tensor.clone()
        for name, tensor in state.items()
        if name.startswith("language_model.")
    }
    folder.mkdir(exist_ok=True)
    save_file(whole, folder / "model.safetensors")
    own = {
        "model_type": "minigpt4",
        "vision_config": model.config.vision_config.to_dict(),
        "text_config": text_config(model),
        "vision_norm_eps": model.config.vision_config.layer_norm_eps,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(own))
    words().save_pretrained(folder)
    square_processor().save_pretrained(folder)
    return folder


def with_qformer(folder: Path):
    """(transformers' Blip2 with a Llama, the folder). MiniGPT-4's names hold no biases of keys."""
    theirs = blip2("llama")
    for layer in theirs.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data.view(3, -1)[1] = 0
    own = {"qformer_config": theirs.config.qformer_config.to_dict(), "num_query_tokens": QUERIES}
    return theirs, save(folder, theirs, bridge_tensors(theirs.state_dict()), has_qformer=True, **own)


class Concatenated(torch.nn.Module):
    """MiniGPT-4 without a Q-Former: transformers' vision encoder and decoder, and a linear on four patches.

    The versions of transformers that the guide was made with multiply what comes as inputs_embeds by Gemma's factor;
    the one here multiplies words alone. `scale` stands for the first.
    """

    def __init__(self, decoder: str, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.blip = blip2(decoder)
        config = self.blip.config
        self.linear = torch.nn.Linear(4 * config.vision_config.hidden_size, config.text_config.hidden_size)
        torch.nn.init.normal_(self.linear.weight, std=0.1)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V]; image positions hold -200."""
        vision = self.blip.vision_model
        hidden = vision.encoder(vision.embeddings(pixel_values)).last_hidden_state
        features = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-5)[:, 1:]
        features = self.linear(features.reshape(len(features), -1, self.linear.in_features)) * self.scale
        places = input_ids == -200
        decoder = self.blip.language_model
        embeddings = decoder.get_input_embeddings()(input_ids.masked_fill(places, 0))
        embeddings = embeddings.masked_scatter(places[..., None], features)
        return decoder(inputs_embeds=embeddings, attention_mask=torch.ones_like(input_ids)).logits


def concatenated(folder: Path, decoder: str = "llama", **config):
    """(the model above, its folder)."""
    theirs = Concatenated(decoder, config.get("feature_scale") or 1.0).eval()
    linear = {f"llama_proj.{name}": tensor.detach().clone() for name, tensor in theirs.linear.named_parameters()}
    own = {"has_qformer": False, "vision_norm_eps": 1e-5} | config
    return theirs, save(folder, theirs.blip, linear, **own)


def checkout(folder: Path, decoder: Path) -> None:
    """Files of the guide's checkout in a folder: Gemma, the vision encoder, a linear, a shard, and both YAML files.

    Heads are as wide as in the releases, whose number no file says. `decoder` holds the tokenizer and gets the weights.
    """
    text = transformers.LlamaConfig.from_pretrained(decoder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": text.vocab_size}
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes, **ids)).save_pretrained(decoder)
    (folder / "weight").mkdir()
    torch.save(eva_tensors(88, 4, 14), folder / "weight" / "eva_vit_g.pth")
    linear = {"llama_proj.weight": torch.randn(32, 4 * 88) * 0.1, "llama_proj.bias": torch.zeros(32)}
    torch.save({"model": linear}, folder / "checkpoint_5.pth")
    (folder / "cc_sbu").mkdir()
    with tarfile.open(folder / "cc_sbu" / "00000.tar", "w") as archive:
        for number in range(8):
            encoded, caption = io.BytesIO(), io.BytesIO(b'{"caption": "A cat."}')
            Image.new("RGB", (30, 20), "red").save(encoded, format="PNG")
            for name, content in ((f"{number}.png", encoded), (f"{number}.json", caption)):
                member = tarfile.TarInfo(name)
                member.size = content.seek(0, io.SEEK_END)
                content.seek(0)
                archive.addfile(member, content)
    model = "model: {arch: minigpt4, model_type: pretrain_gemma, has_qformer: false, image_size: 56, "
    model += "llama_model: gemma-2b-it}\n"
    data = "datasets: {cc_sbu: {build_info: {storage: 'cc_sbu/{00000..00000}.tar'}}}\n"
    run = "run: {output_dir: yaml_dir, init_lr: 1e-4, max_epoch: 4, iters_per_epoch: 5, batch_size_train: 8}\n"
    names = {"train_configs/minigpt4_gemma_stage1_pretrain": data + run, "eval_configs/minigpt4_gemma_eval": ""}
    for name, content in names.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir()
        path.write_text(model + content)


def eva_tensors(width: int, side: int, patch: int, layers: int = 3) -> dict[str, torch.Tensor]:
    """Random tensors of a file such as eva_vit_g.pth, for `side` patches in a row."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, side * side + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for number in range(layers):
        block = f"blocks.{number}."
        for name, rows, columns in (("attn.qkv", 3 * width, width), ("attn.proj", width, width)):
            shapes[f"{block}{name}.weight"] = (rows, columns)
        for name, rows, columns in (("mlp.fc1", 2 * width, width), ("mlp.fc2", width, 2 * width)):
            shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
        for name in ("attn.q_bias", "attn.v_bias", "attn.proj.bias", "norm1.weight", "norm1.bias"):
            shapes[block + name] = (width,)
        shapes |= {block + "norm2.weight": (width,), block + "norm2.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}


def decoder_folder(model, folder: Path) -> Path:
    """The decoder's own folder, with the tokenizer."""
    model.language_model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder
