"""Specs of the decoders: from configs of every age, back again, and what is refused."""

import pytest
import transformers

from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.hf_config import HARMLESS, NEUTRAL
from mindspeed_mm.models.known import model_types
from mindspeed_mm.models.part import find_part, part_for_model_type
from mindspeed_mm.models.text_decoder import gemma, gemma2, internlm2, llama, mistral, mpt, opt, phi3, qwen2, qwen3
from mindspeed_mm.registry import available
from mindspeed_mm.trainer.flops import score_flops, stack_score_flops

MODULES = (gemma, gemma2, internlm2, llama, mistral, mpt, opt, phi3, qwen2, qwen3)
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 96,
}
BLOCK = {
    "num_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "ffn_hidden_size": 56,
    "language_vocab_size": 131,
}


def of(module, **changes):
    return module.from_hf({"model_type": module.FORMAT.model_types[0], **SIZES, "bias": False, **changes})


@pytest.mark.parametrize("module", MODULES)
def test_every_decoder_is_found_by_its_model_type(module):
    for model_type in module.FORMAT.model_types:
        assert part_for_model_type("text_decoder", model_type) is module.PART
    assert find_part("text_decoder", module.PART.name) is module.PART


def test_every_file_of_the_folder_is_tried_here():
    names = {module.PART.name for module in MODULES}
    assert names == set(available("mindspeed_mm.models.text_decoder"))
    assert set(model_types("text_decoder")) >= {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"}


def test_an_unknown_model_type_names_the_nearest():
    with pytest.raises(ConfigError, match='reads model_type "gemma3"; the nearest are gemma2?, gemma2?'):
        part_for_model_type("text_decoder", "gemma3")
    with pytest.raises(ConfigError, match='reads model_type "xyzzy"; known are gemma, gemma2, internlm2'):
        part_for_model_type("text_decoder", "xyzzy")


THEIRS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "phi3": transformers.Phi3Config,
    "opt": transformers.OPTConfig,
    "mpt": transformers.MptConfig,
}
VL = {
    "qwen2": (
        ("qwen2_vl_text", transformers.Qwen2VLTextConfig),
        ("qwen2_5_vl_text", transformers.Qwen2_5_VLTextConfig),
    )
}
"""Text parts of multimodal models that a decoder reads under a model_type of their own, with defaults of their own."""


@pytest.mark.parametrize("name", THEIRS)
def test_every_key_of_transformers_is_known(name):
    """Keys that transformers' class writes are honoured, neutral at the class's own value, or harmless."""
    module = next(module for module in MODULES if module.PART.name == name)
    keys = set(THEIRS[name]().to_dict())
    assert keys <= {*module.FORMAT.honoured, *NEUTRAL, *HARMLESS}


@pytest.mark.parametrize("name", THEIRS)
def test_the_defaults_are_those_of_transformers(name):
    """A config that says nothing means the same to us as one with all values written out."""
    module = next(module for module in MODULES if module.PART.name == name)
    for kind, theirs in ((name, THEIRS[name]), *VL.get(name, ())):
        silent, spoken = module.from_hf({"model_type": kind}), module.from_hf(theirs().to_dict())
        assert silent.model_dump(exclude={"params_dtype"}) == spoken.model_dump(exclude={"params_dtype"}), kind


WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 48}
SAVED = {
    "llama": (llama, {"rope_scaling": YARN, "tie_word_embeddings": True}),
    "mistral": (mistral, {"sliding_window": 5, "head_dim": 10}),
    "mistral, no window": (mistral, {"sliding_window": None}),
    "qwen2": (qwen2, {}),
    "qwen2 window": (qwen2, WINDOW),
    "qwen2 multimodal": (qwen2, {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}),
    "qwen3": (qwen3, {**WINDOW, "head_dim": 10}),
    "gemma": (gemma, {"head_dim": 10}),
    "gemma2": (gemma2, {"head_dim": 10, "attn_logit_softcapping": None, "query_pre_attn_scalar": 20}),
    "phi3": (phi3, {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32}),
    "phi3, some channels": (phi3, {"partial_rotary_factor": 0.5, "sliding_window": 5}),
    "internlm2": (internlm2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_spec_survives_its_hf_config(name):
    module, changes = SAVED[name]
    spec = of(module, **changes)
    again = module.from_hf(module.to_hf(spec, "float32"))
    assert again == spec.model_copy(update={"params_dtype": "float32"})
    block = spec.model_dump(mode="json", exclude_defaults=True)
    assert load_config(module.PART.Spec, block, what="x") == spec


@pytest.mark.parametrize("module", [llama, mistral, qwen2, qwen3, gemma, gemma2])
def test_rotary_keys_of_both_ages(module):
    old = of(module, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = of(module, rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0})
    assert old == new and (old.rotary_base, old.rope_scaling.factor) == (5e5, 2.0)


def test_values_that_older_configs_spell_otherwise():
    assert of(gemma, hidden_act="gelu", hidden_activation=None).activation_func == "gelu_pytorch_tanh"
    su = of(phi3, rope_scaling={**LONGROPE, "type": "su"}, original_max_position_embeddings=32).rope_scaling
    assert (su.rope_type, su.original_max_position_embeddings) == ("longrope", 32)
    assert of(qwen2, rope_scaling={"type": "yarn", "original_max_position_embeddings": 32}).rope_scaling.factor == 3.0
    assert of(qwen2, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}).mrope_section == (1, 1, 2)


def test_windows_of_the_layers():
    assert of(mistral, sliding_window=5).windows == (5,) * 4
    assert of(qwen2, **WINDOW).windows == (None, 5, 5, 5)
    assert of(qwen2, sliding_window=5).windows == ()
    assert of(gemma2, sliding_window=5).windows == (5, None, 5, None)
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    assert of(gemma2, sliding_window=5, layer_types=kinds).windows == (None, 5, None, None)


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (llama, {"sliding_window": 5}, "found sliding_window 5; LlamaForCausalLM without that is supported"),
        (llama, {"final_logit_softcapping": 30.0}, "found final_logit_softcapping 30.0"),
        (llama, {"residual_multiplier": 0.2, "clip_qkv": 8}, "found clip_qkv 8 and residual_multiplier 0.2"),
        (llama, {"attention_dropout": 0.1}, "found attention_dropout 0.1"),
        (llama, {"rope_condense_ratio": 8}, "found rope_condense_ratio 8"),  # LongChat
        (llama, {"rope_interleaved": True}, "found rope_interleaved true"),
        (
            llama,
            {"quantization_config": {"quant_method": "gptq"}},
            "found quantization_config {'quant_method': 'gptq'}",
        ),
        (phi3, {"lm_head_bias": True}, "found lm_head_bias true"),
        (llama, {"layer_types": ["sliding_attention"] * 4}, "found layer_types"),
        (llama, {"partial_rotary_factor": 0.5}, "found a partial_rotary_factor of 0.5; LlamaForCausalLM rotates all"),
        (llama, {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "found RoPE scaling of type 'ntk'"),
        (llama, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "of their own for full_attention"),
        (llama, {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        (mistral, {"attention_bias": True}, "found attention_bias true"),
        (qwen2, {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "sums up to 3; expected 4, half"),
        (qwen2, {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 3]}}, "mrope_section"),
        (qwen3, {"attention_bias": True}, "found attention_bias true"),
        (qwen3, {**WINDOW, "layer_types": ["full_attention"]}, "layer_types has 1 entries; expected 4"),
        (gemma, {"use_bidirectional_attention": True}, "found use_bidirectional_attention true"),
        (gemma, {"hidden_act": "relu"}, "found 'relu', only 'gelu_pytorch_tanh'"),
        (gemma2, {"hidden_activation": "gelu"}, "found 'gelu', only 'gelu_pytorch_tanh'"),
        (gemma2, {"attention_bias": True}, "found attention_bias true"),
        (gemma2, {"sliding_window": None, "layer_types": ["sliding_attention"] * 4}, "sliding_window is null"),
        (phi3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'; Phi-3 has default and longrope"),
        (phi3, {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "long_factor has 1 numbers; expected 4"),
        (phi3, {"partial_rotary_factor": 0.4}, "rotated channels 3 is odd"),
        (phi3, {"resid_pdrop": 0.1}, "found resid_pdrop 0.1"),
        (internlm2, {"bias": True}, "found bias true; InternLM2 without biases"),
    ],
)
def test_what_would_change_numbers_is_refused(module, changes, message):
    with pytest.raises(ConfigError, match=message):
        of(module, **changes)


MPT = {"d_model": 48, "n_heads": 6, "n_layers": 4, "expansion_ratio": 4}


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (gemma, {"hidden_act": "relu"}, r"activation_func: found 'relu'.* \(the file's key: hidden_act\)"),
        (gemma, {"hidden_activation": "relu"}, r"found 'relu'.* \(the file's key: hidden_activation\)"),
        (gemma2, {"hidden_activation": "relu"}, r"found 'relu'.* \(the file's key: hidden_activation\)"),
        (gemma2, {"intermediate_size": 0}, r"found 0 .* \(the file's key: intermediate_size\)"),
        (gemma2, {"num_hidden_layers": None}, "found num_hidden_layers None; expected a whole number"),
        (llama, {"rope_scaling": "linear"}, "found rope_scaling 'linear'; expected an object, or null"),
        (qwen2, WINDOW | {"max_window_layers": None}, "found max_window_layers None; expected a whole number"),
        (gemma2, {"head_dim": 7}, r"kv_channels 7 is odd.* \(the file's keys: head_dim for kv_channels\)"),
        (gemma2, {"num_key_value_heads": 4}, r"file's keys: num_key_value_heads for num_query_groups\)"),
        (opt, {"activation_function": "gelu"}, r"found 'gelu'.* \(the file's key: activation_function\)"),
        (opt, {"ffn_dim": "4"}, r'found "4" .* \(the file\'s key: ffn_dim\)'),
        (opt, {"init_std": -1}, r"found -1 .* \(the file's key: init_std\)"),
        (opt, {"num_attention_heads": 5}, "opt text decoder config: found hidden_size 48 and num_attention_heads 5;"),
        (
            opt,
            {"num_attention_heads": 0, "num_key_value_heads": None},
            r"num_query_groups: found 0 .* \(the file's key: num_attention_heads\)",
        ),
        (opt, {"max_position_embeddings": 0}, r"max_sequence_length: .* \(the file's key: max_position_embeddings\)"),
        (mpt, MPT | {"n_heads": 5}, "mpt text decoder config: found d_model 48 and n_heads 5; expected a width"),
        (mpt, MPT | {"n_heads": 0}, r"num_attention_heads: found 0 .* \(the file's key: n_heads\)"),
        (mpt, MPT | {"n_layers": "4"}, r'num_layers: found "4" .* \(the file\'s key: n_layers\)'),
        (mpt, MPT | {"d_model": None}, r"1 problem\n.*hidden_size: found null.* \(the file's key: d_model\)"),
        (mpt, MPT | {"max_seq_len": 0}, r"\(the file's key: max_seq_len\)"),
        (mpt, MPT | {"layer_norm_epsilon": 0}, r"found 0 .* \(the file's key: layer_norm_epsilon\)"),
        (mpt, MPT | {"expansion_ratio": -4}, r"found -192 .* \(the file's key: expansion_ratio\)"),
        (mpt, MPT | {"expansion_ratio": 2.5}, "found expansion_ratio 2.5; expected a whole number"),
        (mpt, MPT | {"attn_config": "alibi"}, "found attn_config 'alibi'; expected an object"),
        (mpt, MPT | {"attn_config": {"alibi_bias_max": "x"}}, r"\(the file's key: attn_config.alibi_bias_max\)"),
        (mpt, MPT | {"attn_config": {"softmax_scale": -1}}, r"\(the file's key: attn_config.softmax_scale\)"),
    ],
)
def test_refusals_name_the_key_of_the_file(module, changes, message):
    with pytest.raises(ConfigError, match=message):
        of(module, **changes)


def test_keys_that_nobody_knows_are_told(caplog):
    of(llama, mystery=3, silent=None)
    assert "keys that are not known here change nothing: mystery" in caplog.text
    assert "silent" not in caplog.text


def test_a_mistral_config_has_one_window():
    kinds = ["full_attention", *["sliding_attention"] * 3]
    spec = load_config(mistral.PART.Spec, {**BLOCK, "sliding_window": 5, "layer_types": kinds}, what="x")
    with pytest.raises(ConfigError, match="a Mistral config.json has one window for all layers"):
        mistral.to_hf(spec, "float32")


def test_operations_under_a_window():
    """Counted pair by pair; a query and a key at the edge count half."""
    full = score_flops(heads=2, head_size=3, lengths=[10], causal=True)
    assert score_flops(heads=2, head_size=3, lengths=[10], causal=True, window=10) == full == 4 * 6 * 50
    assert score_flops(heads=2, head_size=3, lengths=[10], causal=True, window=4) == 4 * 6 * (4 * 4 / 2 + 6 * 4)
    one = {"heads": 2, "head_size": 3, "lengths": [10, 3], "causal": True}
    stacked = stack_score_flops(layers=3, windows=(4, None, 4), **one)
    assert stacked == 2 * score_flops(**one, window=4) + score_flops(**one)
    assert stack_score_flops(layers=3, windows=(), **one) == 3 * score_flops(**one)
