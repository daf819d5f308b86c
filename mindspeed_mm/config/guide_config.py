"""The unified guide's configuration (training_args, model_args, data_args) as data.json and flags of `train`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from mindspeed_mm.config.hf_training import Migrated, migrate_training
from mindspeed_mm.errors import ConfigError

SECTIONS = ("training_args", "model_args", "data_args")
KINDS = {
    "RECDataset": "rec",
    "REGDataset": "reg",
    "GCDataset": "reg",
    "FlickrDataset": "flickr30k",
    "FlickrBox2Caption": "flickr30k_reverse",
    "CaptionDataset": "caption",
    "InstructDataset": "llava",
    "GQADataset": "gqa",
    "VQAv2Dataset": "vqa_v2",
    "POPEVQADataset": "pope",
    "Point_QA_local": "point_qa_local",
    "Point_QA_twice": "point_qa_twice",
    "V7W_POINT": "v7w_point",
    "GPT4Gen": "gpt4gen",
    "ClevrDataset": "clevr",
    "VCRDataset": "vcr",
}
EXPLANATIONS = "VQAEXDataset"
"""vqa_e or vqa_x, as is_e_dataset says."""

PLACES = {"filename": "data_path", "image_folder": "data_folder"}
GROUNDING = (
    *("template_string", "template_file", "max_dynamic_size", "version", "box_max_num", "caption_with_box"),
    *("caption_min_words", "caption_max_words"),
)
RENAMED = {"question_box_prob": "question_box_prob", "scene_graph_file": "scene_graphs", "scene_graph_index": None}
MIXES = {
    "ConcatDataset": ("concat", ()),
    "InterleaveDateset": ("interleave", ("probabilities", "seed", "stopping_strategy")),
    "SubSet": ("subset", ("portion", "do_shuffle", "seed")),
    "ConcatDatasetWithShuffle": ("shuffled_concat", ("seed", "portion")),
}
PREDICTED = {"validation": "eval", "test": "test"}
"""Single sets that are answered, and their keys of prediction."""

METRICS = {
    "RECComputeMetrics": "rec",
    "GQAComputeMetrics": "exact",
    "POPEComputeMetrics": "exact",
    "BaseComputeMetrics": "exact",
    "PointQAComputeMetrics": "point_qa",
}
FREEZES = ("freeze_backbone", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter")
TEMPLATES = {"vicuna_v1.1": "v1", "llava_v1": "v1", "otter": "otter", "openflamingo": "flamingo"}
MODEL_BY_HAND = {
    "type": "the family follows from the weights",
    "pretrain_mm_mlp_adapter": 'name it as "ckpt_path" of vision_projector in model.json',
    "mm_vision_select_layer": "select_layer of vision_encoder in model.json; config init reads it from the weights",
    "model_max_length": "give --seq-length",
    "image_token_len": "follows from the vision encoder",
    "process_func_args": "the functions of dataset kinds and templates take its place",
    "mm_use_im_start_end": 'set "mm_use_im_start_end" in data.json where the weights were trained so',
}


def migrate(values: Mapping[str, Any], hf_flags: Mapping[str, Any], processes: int) -> tuple[dict[str, Any], Migrated]:
    """data.json (empty without data_args.train) and what became of every value. Flags win over training_args.

    Raises ConfigError for a data set, a mix or a section of another form.
    """
    result = Migrated()
    for name in values:
        if name not in SECTIONS:
            result.unread[name] = repr(values[name])[:80]
    sections = {name: values.get(name) or {} for name in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{name} is {section!r:.60}; expected an object, such as {name} = dict(...)")
    migrate_training({**sections["training_args"], **hf_flags}, processes, result)
    style, parameters = _model(sections["model_args"], result)
    data = _data(sections["data_args"], style, parameters, result)
    return data, result


def _model(section: Mapping[str, Any], result: Migrated) -> tuple[dict[str, Any], dict[str, Any]]:
    """(notation of boxes, keys of dataset_param)."""
    style: dict[str, Any] = {}
    parameters: dict[str, Any] = {"preprocess_parameters": {}}
    for name, value in section.items():
        key = f"model_args.{name}"
        if name == "model_name_or_path" and value:
            parameters["tokenizer_config"] = {"from_pretrained": value}
            vision = section.get("vision_tower") or "VISION_ENCODER"
            result.mapped[key] = "dataset_param.tokenizer_config"
            command = f"mindspeed-mm config init {shlex.quote(str(value))} {shlex.quote(str(vision))} > model.json"
            result.by_hand["model.json"] = f"write it: {command}"
        elif name == "vision_tower" and value:
            parameters["preprocess_parameters"]["image_processer_path"] = value
            result.mapped[key] = "dataset_param.preprocess_parameters.image_processer_path"
        elif name == "target_processor":
            style = _style(value, result)
        elif name == "conv_args":
            _conversation(value, parameters, result)
        elif name in FREEZES:
            if value:
                result.flags += ["--" + name.replace("_", "-"), "true"]
            result.mapped[key] = "--" + name.replace("_", "-")
        elif value is None:
            result.needless[key] = "not asked for"
        elif name in MODEL_BY_HAND:
            result.by_hand[key] = MODEL_BY_HAND[name]
        else:
            result.unread[key] = repr(value)[:80]
    return style, parameters


def _style(value: Any, result: Migrated) -> dict[str, Any]:
    key = "model_args.target_processor"
    boxes = value.get("boxes") if isinstance(value, Mapping) else None
    kind = boxes.get("type") if isinstance(boxes, Mapping) else None
    if kind == "PlainBoxFormatter":
        found: dict[str, Any] = {"notation": "round" if boxes.get("use_small_brackets") else "square"}
        if "precision" in boxes:
            found["precision"] = boxes["precision"]
    elif kind == "TokenFormatter":
        found = {"notation": "bins"}
    else:
        raise ConfigError(f"{key} is {value!r:.60}; expected boxes=dict(type='PlainBoxFormatter' or 'TokenFormatter')")
    result.mapped[key] = "grounding.notation of each set"
    return found


def _conversation(value: Any, parameters: dict[str, Any], result: Migrated) -> None:
    for name, given in (value if isinstance(value, Mapping) else {}).items():
        key = f"model_args.conv_args.{name}"
        if name == "conv_template" and given in TEMPLATES:
            parameters["template_name"] = TEMPLATES[given]
            result.mapped[key] = "dataset_param.template_name"
        elif name == "transforms" and isinstance(given, Mapping) and given.get("type") == "Expand2square":
            parameters["preprocess_parameters"]["pad2square"] = True
            result.mapped[key] = "dataset_param.preprocess_parameters.pad2square (with the mean colour, not white)"
        elif name == "tokenize_kwargs":
            result.by_hand[key] = f"give --seq-length for {given!r:.60}"
        else:
            result.unread[key] = repr(given)[:80]


def _data(
    section: Mapping[str, Any], style: dict[str, Any], parameters: dict[str, Any], result: Migrated
) -> dict[str, Any]:
    sets: list[dict[str, Any]] = []
    data: dict[str, Any] = {}
    for name, value in section.items():
        key = f"data_args.{name}"
        if value is None:
            result.needless[key] = "not asked for"
        elif name == "train":
            mix = _part(value, key, sets, style, result)
            data = {"dataset_type": sets[0]["dataset_type"], "basic_parameters": sets} | parameters
            if isinstance(mix, dict):
                data["mixing"] = mix
        elif name == "validation":
            held: list[dict[str, Any]] = []
            _part(value, key, held, style, result)
            parameters["validation_parameters"] = held
            data |= {"validation_parameters": held} if data else {}
        elif name not in (*PREDICTED, "multitest", "compute_metric", "gen_kwargs"):
            result.unread[key] = repr(value)[:80]
    prediction = _prediction(section, style, result)
    if not data and prediction:  # of a configuration that only evaluates: what is read to check the file
        first = prediction.get("test") or prediction.get("eval") or next(iter(prediction["multitest"].values()))
        alone = {name: value for name, value in first.items() if name != "metric"}
        data = {"dataset_type": first["dataset_type"], "basic_parameters": [alone]} | parameters
    return ({"dataset_param": data} if data else {}) | ({"prediction": prediction} if prediction else {})


def _prediction(section: Mapping[str, Any], style: dict[str, Any], result: Migrated) -> dict[str, Any]:
    """The sets that are answered, each with its metric."""
    found: dict[str, Any] = {}
    for name, target in PREDICTED.items():
        if section.get(name) is not None:
            own = _predicted(section[name], section.get("compute_metric"), f"data_args.{name}", style, result)
            found |= {target: own} if own else {}
    for name, given in (section.get("multitest") or {}).items():
        key = f"data_args.multitest.{name}"
        is_pair = isinstance(given, Mapping) and "cfg" in given
        metric = given.get("compute_metric") if is_pair else section.get("compute_metric")
        own = _predicted(given["cfg"] if is_pair else given, metric, key, style, result)
        if own:
            found.setdefault("multitest", {})[name] = own
            result.mapped[key] = f"prediction.multitest.{name}"
    if section.get("gen_kwargs") is not None and found:
        found["generation"] = dict(section["gen_kwargs"])
        result.mapped["data_args.gen_kwargs"] = "prediction.generation"
    if section.get("compute_metric") is not None:
        result.mapped["data_args.compute_metric"] = "metric of the sets of prediction"
    return found


def _predicted(value: Any, metric: Any, key: str, style: dict[str, Any], result: Migrated) -> dict[str, Any]:
    """A set that is answered; empty where it is a mix, which is left to do."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind in MIXES:
        result.by_hand[key] = "name its sets one by one under prediction.multitest of data.json"
        return {}
    found = _set(value, kind, key, style, result)
    result.mapped[key] = "prediction of data.json"
    name = metric.get("type") if isinstance(metric, Mapping) else metric
    if name in METRICS:
        found["metric"] = METRICS[name]
    elif name is not None:
        result.by_hand[f"{key}.compute_metric"] = f'{name!r:.40} is not known: set "metric" in data.json'
    return found


def _part(
    value: Any, key: str, sets: list[dict[str, Any]], style: dict[str, Any], result: Migrated
) -> int | dict[str, Any]:
    """The number of a set, or a mix of parts (data/mixing.py)."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in MIXES:
        sets.append(_set(value, kind, key, style, result))
        return len(sets) - 1
    operation, options = MIXES[kind]
    many = operation != "subset"
    parts = value.get("cfgs" if many else "cfg")
    if many and not (isinstance(parts, list) and parts):
        raise ConfigError(f"{key}.cfgs is {parts!r:.60}; expected a list of data sets")
    found = (
        [_part(part, f"{key}.cfgs[{number}]", sets, style, result) for number, part in enumerate(parts)]
        if many
        else _part(parts, f"{key}.cfg", sets, style, result)
    )
    mix: dict[str, Any] = {operation: found}
    for name, given in value.items():
        if name in options and given is not None:
            mix["shuffle" if name == "do_shuffle" else name] = given
        elif name not in ("type", "cfgs", "cfg", *options):
            result.unread[f"{key}.{name}"] = repr(given)[:80]
    result.mapped[f"{key}.type"] = f"dataset_param.mixing: {operation}"
    return mix


def _set(value: Any, kind: Any, key: str, style: dict[str, Any], result: Migrated) -> dict[str, Any]:
    if kind == EXPLANATIONS:
        known: str | None = "vqa_e" if value.get("is_e_dataset") else "vqa_x"
    else:
        known = KINDS.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise ConfigError(f"{key} is {value!r:.60}; expected a type of {', '.join((*KINDS, EXPLANATIONS, *MIXES))}")
    if "filename" not in value:
        raise ConfigError(f"{key} has no filename; expected the path of its JSONL")
    found: dict[str, Any] = {"dataset_type": known}
    grounding = dict(style) if known != "llava" else {}
    for name, given in value.items():
        if name == "type" or (name == "is_e_dataset" and kind == EXPLANATIONS):
            result.mapped[f"{key}.{name}"] = f"dataset_type {known}"
        elif given is None:
            result.needless[f"{key}.{name}"] = "not asked for"
        elif name in PLACES:
            found[PLACES[name]] = given
            result.mapped[f"{key}.{name}"] = PLACES[name]
        elif name == "add_coco_prefix":
            told = result.by_hand if given else result.needless
            told[f"{key}.{name}"] = "write COCO_train2014_ before the names of the images" if given else "not asked for"
        elif known != "llava" and (name in GROUNDING or name in RENAMED):
            target = RENAMED.get(name) or name
            grounding[target] = given
            result.mapped[f"{key}.{name}"] = f"grounding.{target}"
        else:
            result.unread[f"{key}.{name}"] = repr(given)[:80]
    return found | ({"grounding": grounding} if grounding else {})
