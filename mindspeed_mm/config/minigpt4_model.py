"""The model section of MiniGPT-4's YAML files, as a model.json and a template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_mm.config.lavis_yaml import Section

VISION_FILES = ("weight/eva_vit_g.pth", "eva_vit_g.pth")
"""Where the guide keeps the vision encoder's file, which is no key of the original's YAML."""

QFORMER_FILE = "blip2_pretrained_flant5xxl.pth"
"""The Q-Former's file where the YAML names none."""

QFORMER_FOLDERS = ("weight", ".")
"""Where that is looked for, and one that the YAML names by its address. Nothing is downloaded."""

QUESTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
"""What the second stage asks for, and HA-DPO: the file prompts/alignment.txt."""

MODEL_YAMLS = {
    "pretrain_vicuna0": "minigpt4_vicuna0.yaml",
    "pretrain_llama2": "minigpt4_llama2.yaml",
    "pretrain_gemma": "minigpt4_gemma.yaml",
    "pretrain": "minigpt_v2.yaml",
}
"""model_type -> the file of its defaults, in minigpt4/configs/models of the user's checkout."""

V2 = "minigpt_v2"

ARCHS = {"minigpt4": tuple(MODEL_YAMLS)[:3], V2: ("pretrain",), "mini_gpt4": tuple(MODEL_YAMLS)[:3]}
"""arch -> its model_types. The last one is the earlier name of the first."""

GEMMA_TURNS = "minigpt4_gemma"
"""Gemma's own turns, in training and in a chat."""

PROMPTS = {
    ("###Human: {} ###Assistant:", "###"): "minigpt4_vicuna",
    ("[INST] {} [/INST]", "</s>"): "minigpt4_llama2",
    ("<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model", "<end_of_turn>"): GEMMA_TURNS,
}
"""(prompt_template without blanks at its ends, end_sym) -> template."""

TEMPLATES = {"pretrain_gemma": "minigpt4_gemma_guide", "pretrain": "minigpt4_v2"}
"""model_types whose prompt is Llama 2's, with another mark of the beginning or no blank behind it."""

USUAL_PROMPTS = {
    "pretrain_vicuna0": ("###Human: {} ###Assistant: ", "###"),
    "pretrain_llama2": ("[INST] {} [/INST] ", "</s>"),
    "pretrain_gemma": ("[INST] {} [/INST] ", "</s>"),
    "pretrain": ("[INST] {} [/INST]", "</s>"),
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
    conversions: dict[str, list[Path]] = field(default_factory=dict)
    """Sets of MiniGPT-v2 -> their annotation files, of which records are to be made."""
    batch: float | None = None
    """Samples of a batch on average, where each set has its own number."""
    report: list[str] = field(default_factory=list)

    def note(self, section: Section, keys: str, meaning: str) -> None:
        """A line of the report."""
        self.report.append(f"{section.name}.{keys}: {meaning}")

    def path(self, section: Section, key: str, kind: str) -> Path:
        """A path that is there. Raises ConfigError where none is given or nothing is there."""
        given = section.take(key)
        if not isinstance(given, str) or not given:
            raise section.wrong(key, given, f"the path of {kind}")
        for folder in self.folders:
            if (folder / given).exists():
                return folder / given
        raise section.wrong(key, given, f"the path of {kind}; nothing is there (nothing is downloaded)")


def map_model(section: Section, mapped: Mapped) -> None:
    """Fill `mapped` from the model section. Raises ConfigError for values that mean nothing here."""
    arch = section.only("arch", tuple(ARCHS), "the architectures that are known")
    kind = section.only("model_type", ARCHS[arch], f"model_types of arch {arch}")
    v2 = arch == V2
    decoder = next((key for key in ("llm_model", "gemma_model") if key in section.given()), "llama_model")
    text = mapped.path(section, decoder, "the decoder's folder")
    mapped.image_size = section.count("image_size", 448 if v2 else 224)
    encoder = {"ckpt_path": str(_vision_file(section, mapped)), "freeze": section.flag("freeze_vit", True)}
    if mapped.image_size != 224:
        encoder["image_size"] = mapped.image_size
    mapped.note(section, f"{decoder}, image_size, freeze_vit", "text_decoder and vision_encoder of model.json")
    has_qformer = section.flag("has_qformer", not v2)
    if v2 and has_qformer:
        raise section.wrong("has_qformer", True, "false with arch minigpt_v2")
    if not has_qformer and kind == "pretrain_vicuna0":
        raise section.wrong("has_qformer", False, "true with model_type pretrain_vicuna0")
    if section.take("ckpt") is not None:
        mapped.checkpoint = mapped.path(section, "ckpt", "a checkpoint")
    projector = _qformer(section, mapped) if has_qformer else _concatenation(section, mapped)
    if kind == "pretrain_gemma":
        projector["feature_scale"] = _gemma_scale(section, text)
        mapped.note(section, "model_type", "feature_scale of model.json, as the guide's repository trained Gemma")
    block = {"ckpt_path": str(text)} | (_adapters(section, mapped) if v2 else {"freeze": True})
    mapped.model = {
        "model_id": "minigpt4",
        "text_decoder": block | _recomputed(section, mapped, encoder),
        "image_encoder": {"vision_encoder": encoder, "vision_projector": projector},
    }
    mapped.template = _template(section, kind)
    mapped.note(section, "prompt_template, end_sym", f'template "{mapped.template}"')
    _check_rest(section, mapped, kind)


def _adapters(section: Section, mapped: Mapped) -> dict[str, Any]:
    """MiniGPT-v2's LoRA on the decoder, which goes on from the one in `ckpt` where that has one."""
    from mindspeed_mm.weights.adapter_names import state_names
    from mindspeed_mm.weights.folders import open_file

    lora = {"r": section.count("lora_r", 64), "alpha": section.number("lora_alpha", 16)}
    lora["dropout"] = section.number("lora_dropout", 0.05)
    lora["target_modules"] = section.take("lora_target_modules", ["q_proj", "v_proj"])
    if mapped.checkpoint is not None and mapped.checkpoint.is_file():
        if state_names(open_file(mapped.checkpoint).names):
            lora["load"] = str(mapped.checkpoint)
    begin = f"from {mapped.checkpoint}" if "load" in lora else "new ones"
    mapped.note(section, "lora_r, lora_alpha, lora_dropout, lora_target_modules", f"text_decoder.lora, {begin}")
    return {"lora": lora}


def _recomputed(section: Section, mapped: Mapped, encoder: dict[str, Any]) -> dict[str, Any]:
    """Keys of the decoder for use_grad_checkpoint_llm; those of use_grad_checkpoint go to the vision encoder."""
    keys = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if section.flag("use_grad_checkpoint"):
        if encoder["freeze"]:
            mapped.note(section, "use_grad_checkpoint", "no effect: nothing is kept of the frozen vision encoder")
        else:
            encoder |= keys
            mapped.note(section, "use_grad_checkpoint", "recompute_* of the vision_encoder")
    if not section.flag("use_grad_checkpoint_llm"):
        return {}
    mapped.note(section, "use_grad_checkpoint_llm", "recompute_* of the text_decoder")
    return keys


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
    given = section.take("q_former_model")
    address = str(given or QFORMER_FILE)
    names = [address]
    if given is None or "://" in address:
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
    if name == GEMMA_TURNS and kind == "pretrain_gemma":
        return name
    if name == GEMMA_TURNS or (name == "minigpt4_vicuna") != (kind == "pretrain_vicuna0"):
        raise section.wrong("prompt_template", prompt, f"{usual[0]!r}, the one of model_type {kind}")
    return TEMPLATES.get(kind, name)


def _check_rest(section: Section, mapped: Mapped, kind: str) -> None:
    section.only("vit_model", ("eva_clip_g",), "the only vision encoder")
    section.only("prompt", ("",), "templates hold prompts")
    section.only("drop_path_rate", (0, 0.0), "layers are not dropped")
    if "lora" not in mapped.model["text_decoder"]:
        section.only("lora_r", (0, -1), "give --lora-r and its fellows, which train LoRA")
    section.only("chat_template", (kind == "pretrain",), f"the template of model_type {kind} decides")
    section.take("vit_precision")
    section.take("device_8bit")
    mapped.note(section, "vit_precision, device_8bit", "no effect: --bf16, --fp16 and --device say it")
