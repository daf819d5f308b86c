"""The model section of MiniGPT-4's YAML files, as a model.json and a template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_mm.config.lavis_yaml import Section

VISION_FILES = ("weight/eva_vit_g.pth", "eva_vit_g.pth")
"""Where the guide keeps the vision encoder's file, which is no key of the original's YAML."""

QFORMER_FOLDERS = ("weight", ".")
"""Where a Q-Former's file is looked for that the YAML names by its address. Nothing is downloaded."""

QUESTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the image.",
    "Could you describe the contents of this image for me?",
)
"""What the second stage asks for."""

MODEL_YAMLS = {
    "pretrain_vicuna0": "minigpt4_vicuna0.yaml",
    "pretrain_llama2": "minigpt4_llama2.yaml",
    "pretrain_gemma": "minigpt4_gemma.yaml",
}
"""model_type -> the file of its defaults, in minigpt4/configs/models of the user's checkout."""

PROMPTS = {
    ("###Human: {} ###Assistant:", "###"): "minigpt4_vicuna",
    ("[INST] {} [/INST]", "</s>"): "minigpt4_llama2",
}
"""(prompt_template without blanks at its ends, end_sym) -> template."""

USUAL_PROMPTS = {
    "pretrain_vicuna0": ("###Human: {} ###Assistant: ", "###"),
    "pretrain_llama2": ("[INST] {} [/INST] ", "</s>"),
    "pretrain_gemma": ("[INST] {} [/INST] ", "</s>"),
}


@dataclass
class Mapped:
    """What a YAML file became. `report` says key by key what was made of it."""

    folders: tuple[Path, ...]
    """Relative paths are looked for in these, in this order."""
    model: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    image_tokens: int = 0
    template: str = ""
    checkpoint: Path | None = None
    """`ckpt`, where it is given."""
    files: tuple[Path, ...] = ()
    """Files of the projector, where it has several: they have to lie in one folder."""
    report: list[str] = field(default_factory=list)

    def note(self, section: Section, keys: str, meaning: str) -> None:
        """A line of the report."""
        self.report.append(f"{section.name}.{keys}: {meaning}")

    def path(self, section: Section, key: str, kind: str) -> Path:
        """A path that is there. Raises ConfigError where none is given or nothing is there."""
        given = section.take(key)
        if not isinstance(given, str):
            raise section.wrong(key, given, f"the path of {kind}")
        for folder in self.folders:
            if (folder / given).exists():
                return folder / given
        raise section.wrong(key, given, f"the path of {kind}; nothing is there (nothing is downloaded)")


def map_model(section: Section, mapped: Mapped) -> None:
    """Fill `mapped` from the model section. Raises ConfigError for values that mean nothing here."""
    section.only("arch", ("minigpt4",), "MiniGPT-v2's checkpoints with LoRA weights are not read")
    kind = section.only("model_type", tuple(MODEL_YAMLS), "models that are known")
    decoder = next((key for key in ("llm_model", "gemma_model") if key in section.given()), "llama_model")
    text = mapped.path(section, decoder, "the decoder's folder")
    mapped.image_size = section.count("image_size", 224)
    encoder = {"ckpt_path": str(_vision_file(section, mapped)), "freeze": section.flag("freeze_vit", True)}
    if mapped.image_size != 224:
        encoder["image_size"] = mapped.image_size
    mapped.note(section, f"{decoder}, image_size, freeze_vit", "text_decoder and vision_encoder of model.json")
    has_qformer = section.flag("has_qformer", True)
    if not has_qformer and kind == "pretrain_vicuna0":
        raise section.wrong("has_qformer", False, "true with model_type pretrain_vicuna0")
    if section.take("ckpt") is not None:
        mapped.checkpoint = mapped.path(section, "ckpt", "a checkpoint")
    projector = _qformer(section, mapped) if has_qformer else _concatenation(section, mapped)
    if kind == "pretrain_gemma":
        projector["feature_scale"] = _gemma_scale(section, text)
        mapped.note(section, "model_type", "feature_scale of model.json, as the guide's repository trained Gemma")
    mapped.model = {
        "model_id": "minigpt4",
        "text_decoder": {"ckpt_path": str(text), "freeze": True},
        "image_encoder": {"vision_encoder": encoder, "vision_projector": projector},
    }
    mapped.template = _template(section, kind)
    mapped.note(section, "prompt_template, end_sym", f'template "{mapped.template}"')
    _check_rest(section, mapped)


def _vision_file(section: Section, mapped: Mapped) -> Path:
    if section.take("vit_weights") is not None:
        return mapped.path(section, "vit_weights", "eva_vit_g.pth")
    for folder in mapped.folders:
        for name in VISION_FILES:
            if (folder / name).is_file():
                return folder / name
    raise section.wrong("vit_weights", None, f"the path of eva_vit_g.pth, or the file as {' or '.join(VISION_FILES)}")


def _qformer(section: Section, mapped: Mapped) -> dict[str, Any]:
    mapped.image_tokens = section.count("num_query_token", 32)
    address = str(section.take("q_former_model", "blip2_pretrained_flant5xxl.pth"))
    names = [address]
    if "://" in address:
        names = [f"{folder}/{address.rpartition('/')[2]}" for folder in QFORMER_FOLDERS]
    places = [folder / name for folder in mapped.folders for name in names]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise section.wrong("q_former_model", address, "a file that is there; nothing is downloaded")
    mapped.note(section, "q_former_model, num_query_token, freeze_qformer", f"vision_projector, from {found}")
    projector: dict[str, Any] = {"model_id": "qformer", "ckpt_path": str(found), "vision_norm_epsilon": 1e-5}
    projector["num_query_tokens"] = mapped.image_tokens
    projector["train_linear_only"] = section.flag("freeze_qformer", True)
    if mapped.checkpoint is not None and mapped.checkpoint.is_file():
        mapped.files = (found, mapped.checkpoint)
    else:
        projector["fresh_linear"] = True
    return projector


def _concatenation(section: Section, mapped: Mapped) -> dict[str, Any]:
    for key in ("freeze_qformer", "q_former_model", "num_query_token"):
        section.take(key)
    mapped.image_tokens = (mapped.image_size // 14) ** 2 // 4
    mapped.note(section, "has_qformer", "projector patch_concat; keys of the Q-Former have no effect")
    projector = {"model_id": "patch_concat"}
    if mapped.checkpoint is not None and mapped.checkpoint.is_file():
        projector["ckpt_path"] = str(mapped.checkpoint)
    return projector


def _gemma_scale(section: Section, text: Path) -> float:
    try:
        return json.loads((text / "config.json").read_text(encoding="utf-8"))["hidden_size"] ** 0.5
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise section.wrong("llama_model", str(text), "a folder of Gemma whose config.json has hidden_size") from error


def _template(section: Section, kind: str) -> str:
    usual = USUAL_PROMPTS[kind]
    prompt = section.take("prompt_template", usual[0])
    end = section.take("end_sym", usual[1])
    end = usual[1] if end == "\n" else end  # the default of the first stage, which has no prompt
    name = PROMPTS.get((str(prompt).strip(), end))
    if name is None:
        known = " or ".join(f"{prompt!r} with end_sym {end!r}" for prompt, end in PROMPTS)
        raise section.wrong("prompt_template", f"{prompt} with end_sym {end}", known)
    if (name == "minigpt4_vicuna") != (kind == "pretrain_vicuna0"):
        raise section.wrong("prompt_template", prompt, f"{usual[0]!r}, the one of model_type {kind}")
    return "minigpt4_gemma_guide" if kind == "pretrain_gemma" else name


def _check_rest(section: Section, mapped: Mapped) -> None:
    section.only("vit_model", ("eva_clip_g",), "the only vision encoder")
    section.only("prompt", ("",), "templates hold prompts")
    section.only("drop_path_rate", (0, 0.0), "layers are not dropped")
    section.only("lora_r", (0, -1), "give --lora-r and its fellows, which train LoRA")
    section.only("use_grad_checkpoint", (False,), 'keys recompute_* of model.json, "--cfg-options model..."')
    section.only("chat_template", (False,), "templates decide")
    section.take("vit_precision")
    section.take("device_8bit")
    mapped.note(section, "vit_precision, device_8bit", "no effect: --bf16, --fp16 and --device say it")
