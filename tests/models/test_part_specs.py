"""Specs of the parts and of the model: the ancestor's keys, HF configs of every age, and clear refusals."""

import copy
import json

import pytest

from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.families.llava import text_config, vision_config, vision_select
from mindspeed_mm.models.part import part_of
from mindspeed_mm.models.spec import MODEL_KEYS, load_model_spec
from mindspeed_mm.models.text_decoder import llama
from mindspeed_mm.models.text_decoder.llama import LlamaSpec
from mindspeed_mm.models.vision_encoder import clip
from mindspeed_mm.models.vision_encoder.clip import ClipSpec
from mindspeed_mm.models.vision_projector import mlp
from mindspeed_mm.models.vision_projector.mlp import MlpSpec

# The blocks that the ancestor's guide describes for LLaVA-1.5-7B, with every key it knows.
COMMON = {
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "apply_query_key_layer_scaling": False,
    "layernorm_zero_centered_gamma": False,
    "attention_softmax_in_fp32": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bf16": True,
    "params_dtype": "bf16",
}
ANCESTOR = {
    "model_id": "llava",
    "text_encoder": None,
    "video_encoder": None,
    "text_decoder": {
        **COMMON,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 32,
        "ffn_hidden_size": 11008,
        "max_position_embeddings": 4096,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": "silu",
        "normalization": "RMSNorm",
        "persist_layer_norm": True,
        "deallocate_pipeline_outputs": True,
        "language_vocab_size": 32000,
        "language_max_sequence_length": 4096,
        "lm_position_embedding_type": "rope",
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 32,
        "is_encoder_decoder": False,
        "tokenizer_padding_side": "right",
        "freeze": True,
        "ckpt_path": "converted_vicuna.pt",
    },
    "image_encoder": {
        "vision_encoder": {
            **COMMON,
            "model_id": "clip",
            "num_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_query_groups": 16,
            "ffn_hidden_size": 4096,
            "kv_channels": 64,
            "add_bias_linear": True,
            "add_qkv_bias": True,
            "gated_linear_unit": False,
            "activation_func": "quick_gelu",
            "normalization": "LayerNorm",
            "post_layer_norm": False,
            "device": "npu",
            "add_class_token": True,
            "class_token_len": 1,
            "patch_size": 14,
            "image_size": 336,
            "freeze": True,
            "ckpt_path": "converted_clip.pt",
        },
        "vision_projector": {
            "model_id": "mlp",
            "num_layers": 2,
            "num_attention_heads": 1,
            "gated_linear_unit": False,
            "bias_activation_fusion": False,
            "add_bias_linear": True,
            "input_size": 1024,
            "ffn_hidden_size": 4096,
            "hidden_size": 4096,
            "activation_func": "gelu",
            "bf16": True,
            "params_dtype": "fp16",
            "freeze": False,
            "ckpt_path": None,
        },
    },
}

LLAMA = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "ffn_hidden_size": 12,
    "language_vocab_size": 11,
}
CLIP = {"num_layers": 4, "hidden_size": 128, "patch_size": 14, "image_size": 56}


def test_the_ancestors_model_json_is_read():
    spec = load_model_spec(ANCESTOR)
    assert spec.vision_encoder.num_built_layers == 23 and spec.vision_encoder.num_image_tokens == 576
    assert spec.text_decoder.kv_channels == 128 and str(spec.text_decoder.dtype) == "torch.bfloat16"
    assert str(spec.vision_projector.dtype) == "torch.float16"  # params_dtype decides
    assert spec.vision_projector.fresh and not spec.text_decoder.fresh
    assert {kind: part.name for kind, part in spec.parts().items()} == {
        "text_decoder": "llama",
        "vision_encoder": "clip",
        "vision_projector": "mlp",
    }
    assert part_of("text_decoder", spec.part("text_decoder")).kind == "text_decoder"
    assert set(ANCESTOR) <= set(MODEL_KEYS)


def test_a_spec_survives_json():
    spec = load_model_spec(ANCESTOR)
    assert load_model_spec(spec.model_dump(mode="json")) == spec
    assert load_model_spec(spec.model_dump(mode="json", exclude_defaults=True)) == spec


def test_only_what_matters_must_be_given():
    decoder = load_config(LlamaSpec, LLAMA, what="x")
    assert (decoder.num_query_groups, decoder.kv_channels, decoder.language_max_sequence_length) == (4, 2, 4096)
    vision_encoder = load_config(ClipSpec, CLIP, what="x")
    assert (vision_encoder.num_attention_heads, vision_encoder.kv_channels, vision_encoder.ffn_hidden_size) == (
        2,
        64,
        512,
    )
    projector = load_config(MlpSpec, {"input_size": 3, "hidden_size": 5}, what="x")
    assert projector.ffn_hidden_size == 5


def test_null_means_derive_and_an_empty_path_means_none():
    decoder = load_config(
        LlamaSpec, {**LLAMA, "num_query_groups": None, "kv_channels": None, "ckpt_path": ""}, what="x"
    )
    assert decoder.num_query_groups == 4 and decoder.kv_channels == 2 and decoder.ckpt_path is None


def test_norm_epsilon_is_another_name():
    assert load_config(LlamaSpec, {**LLAMA, "norm_epsilon": 1e-6}, what="x").layernorm_epsilon == 1e-6
    with pytest.raises(ConfigError, match="found both norm_epsilon and layernorm_epsilon"):
        load_config(LlamaSpec, {**LLAMA, "norm_epsilon": 1e-6, "layernorm_epsilon": 1e-6}, what="x")


@pytest.mark.parametrize("kind", ["text_decoder", "vision_encoder"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bias_dropout_fusion", True, "found True, only False is supported: kernels are chosen by the platform"),
        ("apply_query_key_layer_scaling", True, "only False is supported"),
        ("layernorm_zero_centered_gamma", True, "only False is supported"),
        ("attention_softmax_in_fp32", False, "only True is supported"),
        ("hidden_dropout", 0.1, "found 0.1, only 0.0 is supported"),
        ("normalization", "BatchNorm", "found 'BatchNorm', only"),
        ("num_layer", 3, 'unknown key; did you mean "num_layers"'),
        ("params_dtype", "int8", 'found "int8"'),
        ("num_layers", 0, "greater than 0"),
        ("num_layers", "32", "valid integer"),
    ],
)
def test_values_that_are_not_supported_are_refused_by_their_path(kind, key, value, message):
    config = copy.deepcopy(ANCESTOR)
    holder = config if kind == "text_decoder" else config["image_encoder"]
    holder[kind][key] = value
    path = f"{'' if kind == 'text_decoder' else 'image_encoder.'}{kind}.{key}"
    with pytest.raises(ConfigError, match=message) as error:
        load_model_spec(config)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size 8 is not divisible by num_attention_heads 3"),
        ({"num_query_groups": 3}, "num_attention_heads 4 is not a multiple of num_query_groups 3"),
        ({"kv_channels": 3}, "kv_channels 3 is odd"),
        ({"language_max_sequence_length": 5000}, "language_max_sequence_length 5000 is more than"),
        ({"activation_func": "gelu"}, "found 'gelu', only 'silu'"),
        ({"lm_position_embedding_type": "learned"}, "the decoder has rotary positions"),
        ({"is_encoder_decoder": True}, "it is a decoder"),
        ({"tokenizer_padding_side": "left"}, "batches are padded on the right"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "type 'ntk'; linear, dynamic, llama3, yarn, longrope are"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}},
            "linear takes factor; remove low_freq_factor",
        ),
        ({"rope_scaling": 3}, "input should be an object"),
    ],
)
def test_a_llama_that_cannot_be_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(LlamaSpec, {**LLAMA, **changes}, what="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96}, "hidden_size 96 is not a multiple of 64; give num_attention_heads"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 x kv_channels None"),
        ({"kv_channels": 32}, "CLIP has plain multi-head attention whose heads fill its width"),
        ({"num_query_groups": 1}, "CLIP has plain multi-head attention whose heads"),
        ({"image_size": 13}, "image_size 13 holds no patch of patch_size 14"),
        ({"select_layer": -5}, r"select_layer -5 \(HF's vision_feature_layer\) is outside the 4 layers"),
        ({"select_layer": 5}, "select_layer 5 .* is outside"),
        ({"class_token_len": 2}, "CLIP has one class token"),
        ({"post_layer_norm": True}, "the feature is taken before the final norm"),
    ],
)
def test_a_vision_encoder_that_cannot_be_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ClipSpec, {**CLIP, **changes}, what="x")


@pytest.mark.parametrize(("select", "built"), [(-1, 4), (-2, 3), (-4, 1), (2, 2)])
def test_layers_behind_the_feature_are_not_built(select, built):
    assert load_config(ClipSpec, {**CLIP, "select_layer": select}, what="x").num_built_layers == built


def test_the_class_token_may_be_kept():
    assert load_config(ClipSpec, {**CLIP, "select_feature": "cls_patch"}, what="x").num_image_tokens == 17


def test_parts_are_checked_against_each_other_all_at_once():
    config = copy.deepcopy(ANCESTOR)
    config["image_encoder"]["vision_projector"].update(input_size=1, hidden_size=2)
    config["text_decoder"]["language_max_sequence_length"] = 576
    with pytest.raises(ConfigError) as error:
        load_model_spec(config)
    assert "vision_projector.input_size: found 1, expected 1024" in str(error.value)
    assert "vision_projector.hidden_size: found 2, expected 4096" in str(error.value)
    assert "language_max_sequence_length: found 576, expected more than the 576 tokens" in str(error.value)


def test_patches_and_unknown_parts_are_refused(tmp_path):
    assert load_model_spec({**ANCESTOR, "patch": {}}).patch is None
    with pytest.raises(ConfigError, match="found fa_fix; the ancestor's run-time patches do not exist here"):
        load_model_spec({**ANCESTOR, "patch": {"fa_fix": True}})
    config = copy.deepcopy(ANCESTOR)
    config["text_decoder"]["model_id"] = "lama"
    with pytest.raises(ConfigError, match='unknown text_decoder model_id "lama"; did you mean "llama"'):
        load_model_spec(config)
    (tmp_path / "model.json").write_text(json.dumps({"text_decoder": 3, "image_encoder": []}))
    with pytest.raises(ConfigError, match="model.json"):
        load_model_spec(tmp_path / "model.json")


# --- HF configs ----------------------------------------------------------------------------------------------------


def test_configs_may_omit_what_transformers_defaults():
    decoder = llama.from_hf({"model_type": "llama"})
    assert (decoder.num_layers, decoder.hidden_size, decoder.ffn_hidden_size) == (32, 4096, 11008)
    assert (decoder.layernorm_epsilon, decoder.rotary_base, decoder.num_query_groups) == (1e-6, 10000.0, 32)
    vision_encoder = clip.from_hf({"model_type": "clip_vision_model"})
    assert (
        vision_encoder.hidden_size,
        vision_encoder.num_layers,
        vision_encoder.num_attention_heads,
        vision_encoder.patch_size,
    ) == (768, 12, 12, 32)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_rope_of_every_age(rope):
    spec = llama.from_hf({"model_type": "llama", **rope})
    assert spec.rotary_base == 5e5 and (spec.rope_scaling.rope_type, spec.rope_scaling.factor) == ("linear", 2.0)


def test_a_spec_survives_its_hf_config():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    spec = load_config(LlamaSpec, {**LLAMA, "rope_scaling": scaling, "params_dtype": "float16"}, what="x")
    assert llama.from_hf(llama.to_hf(spec, "float16")) == spec


@pytest.mark.parametrize("rope", [{"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_unscaled_rope(rope):
    assert llama.from_hf({"model_type": "llama", **rope}).rope_scaling is None
    assert load_config(LlamaSpec, {**LLAMA, "rope_scaling": {"rope_type": "default"}}, what="x").rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, 'found model_type "gpt2"; expected one of llama'),
        ({"attention_bias": True}, "found attention_bias true"),
        ({"mlp_bias": True}, "found mlp_bias true"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "activation_func: found 'gelu'"),
    ],
)
def test_variants_of_llama_that_are_not_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        llama.from_hf({"model_type": "llama", **changes})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "siglip_vision_model"}, 'found model_type "siglip_vision_model"'),
        ({"vision_feature_select_strategy": "all"}, "found vision_feature_select_strategy 'all'"),
        ({"vision_feature_layer": [-2, -14]}, r"select_layer \[-2, -14\] .* is outside the 12 layers"),
    ],
)
def test_variants_of_clip_that_are_not_built(config, message):
    with pytest.raises(ConfigError, match=message):
        clip.from_hf(config)


def test_a_list_of_one_layer_is_that_layer():
    assert clip.from_hf({"vision_feature_layer": [-3]}) == clip.from_hf({"vision_feature_layer": -3})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mm_projector_type": "identity", "mm_hidden_size": 4}, 'found mm_projector_type "identity" .it has no weigh'),
        ({"mm_projector_type": "cabstract", "mm_hidden_size": 4}, 'found mm_projector_type "cabstract"; linear and'),
        ({"mm_projector_type": "mlp0x_gelu", "mm_hidden_size": 4}, 'found mm_projector_type "mlp0x_gelu"; linear and'),
        ({"mm_projector_type": 2, "mm_hidden_size": 4}, 'found mm_projector_type "2"; linear and'),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_hidden_size is missing"),
        ({"projector_hidden_act": "prelu"}, 'projector_hidden_act "prelu" and multimodal_projector_bias true'),
        ({"multimodal_projector_bias": None}, "and multimodal_projector_bias null"),
    ],
)
def test_variants_of_the_projector_that_are_not_built(config, message):
    with pytest.raises(ConfigError, match=message):
        mlp.from_hf(config)


def test_goldens_describe_one_model(golden):
    def read(name):
        return json.loads((golden / "models" / name / "config.json").read_text())

    hub, present = read("llava_hf"), read("llava_hf_v5")
    for part, inner in ((llama, text_config), (clip, vision_config), (mlp, dict)):
        old, new = (part.from_hf(inner(config)).model_copy(update={"params_dtype": None}) for config in (hub, present))
        assert old == new
    original = read("llava_original")
    assert llama.from_hf(text_config(hub)).language_vocab_size == 1024
    assert llama.from_hf(original | {"model_type": "llama"}).language_vocab_size == 1000
    vision_encoder = clip.from_hf(read("clip_hf") | vision_select(original))
    assert vision_encoder.model_copy(update={"params_dtype": None}) == clip.from_hf(vision_config(hub))
    assert mlp.from_hf(original) == mlp.from_hf(hub)
    assert llama.from_hf(read("vicuna_bin")) == llama.from_hf(read("vicuna"))
