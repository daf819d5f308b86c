"""Loading a part: equal tensors from every layout, every slice of a rank, and every way not to fit."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.part import find_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.text_decoder import llama
from mindspeed_mm.weights.loading import load_part, table
from mindspeed_mm.weights.shards import unshard
from tests.weights.conftest import TINY_LLAMA
from tests.weights.weight_helpers import empty_state, random_hf_state

GOLDEN_LAYOUTS = {
    "text_decoder": ("llava_original", "vicuna", "vicuna_bin"),
    "vision_encoder": ("llava_original", "clip_hf", "clip_openai.pt"),
    "vision_projector": ("llava_original", "mm_projector.bin"),
}


def load(part, spec, path, **ranks):
    """(state, report) of a part that was NaN before."""
    state = empty_state(part, spec, open_source(path).part(part.kind), tp_size=ranks.get("tp_size", 1))
    return state, load_part(state, part, spec, open_source(path), **ranks)


@pytest.mark.parametrize("kind", GOLDEN_LAYOUTS)
def test_every_golden_layout_gives_equal_tensors(golden_models, golden_spec, kind):
    part, spec = golden_spec.parts()[kind], golden_spec.part(kind)
    states = [load(part, spec, golden_models / name)[0] for name in GOLDEN_LAYOUTS[kind]]
    assert sorted(states[0]) == sorted(part.rules["ours"].expected(spec.geometry))
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


@pytest.mark.parametrize("kind", GOLDEN_LAYOUTS)
def test_llava_hf_gives_the_tensors_of_llava(golden_models, golden_spec, golden_hf_spec, kind):
    reference, _ = load(golden_spec.parts()[kind], golden_spec.part(kind), golden_models / "llava_original")
    state, report = load(golden_hf_spec.parts()[kind], golden_hf_spec.part(kind), golden_models / "llava_hf")
    assert report.layout == "llava-hf" and report.config == "equal"
    for name, tensor in reference.items():
        assert torch.equal(state[name][: len(tensor)], tensor)  # llava-hf has 24 more rows of vocabulary


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_slices_of_all_ranks_make_the_whole(tiny_llama, llama_part, tp_size):
    folder, _, _ = tiny_llama
    config = {**TINY_LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2}
    spec = llama.from_hf(config)
    save_file(random_hf_state(spec), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    whole, _ = load(llama_part, spec, folder)
    ranks = [load(llama_part, spec, folder, tp_rank=rank, tp_size=tp_size)[0] for rank in range(tp_size)]
    for name, tensor in whole.items():
        rule = llama_part.rules["hf"].step_of(name, spec.geometry).rule
        assert torch.equal(unshard([state[name] for state in ranks], rule, spec.geometry), tensor)


def test_a_pipeline_stage_loads_its_own_layers(tiny_llama, llama_part):
    folder, spec, _ = tiny_llama
    whole, _ = load(llama_part, spec, folder)
    stage = {
        name.replace("layers.1.", "layers.0."): torch.full_like(tensor, float("nan"))
        for name, tensor in whole.items()
        if "layers.1." in name or name in ("decoder.final_layernorm.weight", "output_layer.weight")
    }
    report = load_part(stage, llama_part, spec, open_source(folder), layer_offset=1, num_local_layers=1)
    assert report.loaded == len(stage)
    assert torch.equal(stage["decoder.layers.0.mlp.linear_fc1.weight"], whole["decoder.layers.1.mlp.linear_fc1.weight"])


def test_a_module_is_filled_in_place_and_cast(tmp_path):
    part = find_part("vision_projector", "mlp")
    spec = part.Spec(input_size=3, hidden_size=4)
    tensors = {"0.weight": torch.randn(4, 3), "0.bias": torch.randn(4), "2.weight": torch.randn(4, 4)}
    torch.save({**tensors, "2.bias": torch.randn(4)}, tmp_path / "p.bin")
    module = torch.nn.Module()
    module.encoder = torch.nn.Module()
    module.encoder.linear_fc1, module.encoder.linear_fc2 = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)
    module.bfloat16()
    load_part(module, part, spec, open_source(tmp_path / "p.bin"))
    assert torch.equal(module.encoder.linear_fc1.weight, tensors["0.weight"].bfloat16())
    assert module.encoder.linear_fc1.weight.requires_grad


def test_the_table_says_in_words_what_became_of_each_part(golden_models, golden_spec):
    parts = golden_spec.parts()
    reports = [load(parts["vision_encoder"], golden_spec.vision_encoder, golden_models / "clip_hf")[1]]
    fresh = {"encoder.linear_fc1.weight": torch.zeros(1), "encoder.linear_fc1._extra_state": None}
    reports.append(load_part(fresh, parts["vision_projector"], golden_spec.vision_projector, None))
    first, second = table(reports).splitlines()
    path = golden_models / "clip_hf"
    assert first.startswith(f"  vision_encoder    loaded from {path} (41 tensors, layout clip); the config beside")
    assert "; tensors stored there that are not needed: 18, such as vision_model." in first
    assert second == "  vision_projector  random values (1 tensors), since the model config gives no ckpt_path"
    bare = dataclasses.replace(reports[0], config="none there", dropped=0)
    assert table([bare]).endswith("no config lies beside them, so that only names and shapes were compared")
    assert (reports[0].loaded, reports[0].dropped, reports[0].fresh, reports[1].fresh) == (41, 18, 0, 1)


def test_a_part_without_weights_must_declare_it(tiny_llama, llama_part):
    _, spec, _ = tiny_llama
    with pytest.raises(WeightError, match='found neither ckpt_path nor fresh.*block "text_decoder" of model.json'):
        load_part({}, llama_part, spec, None)
    assert load_part({}, llama_part, spec.model_copy(update={"fresh": True}), None).loaded == 0


def test_a_source_whose_config_differs_is_refused_with_all_fields(tiny_llama, llama_part):
    folder, spec, _ = tiny_llama
    state = empty_state(llama_part, spec, open_source(folder).part("text_decoder"))
    changed = {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, **changed}))
    wanted = '(?s)is another model than model.json describes.*Correct these keys of "text_decoder" in model.json'
    with pytest.raises(WeightError, match=wanted) as error:
        load_part(state, llama_part, spec, open_source(folder))
    assert "layernorm_epsilon: the weights have 1e-05, model.json says 1e-06" in str(error.value)
    assert "rotary_base: the weights have 500000.0" in str(error.value)
    assert "rope_scaling: the weights have RopeScaling(rope_type='linear'" in str(error.value)


def test_the_selected_layer_is_compared_where_the_source_says_it(golden_models, golden_spec):
    part = find_part("vision_encoder", "clip")
    spec = golden_spec.vision_encoder.model_copy(update={"select_layer": -3})
    load(part, spec, golden_models / "clip_hf")
    with pytest.raises(WeightError, match="select_layer: the weights have -2, model.json says -3"):
        load(part, spec, golden_models / "llava_original")


def test_another_architecture_is_refused(tiny_llama, llama_part):
    folder, spec, _ = tiny_llama
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, "model_type": "gpt2"}))
    with pytest.raises(ConfigError, match='found model_type "gpt2"'):
        load_part({}, llama_part, spec, open_source(folder))


def test_missing_and_extra_tensors_name_the_file(tiny_llama, llama_part):
    folder, spec, state = tiny_llama
    state["model.layers.2.mlp.up_proj.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"llama \(text_decoder\): the tensors are not those") as error:
        load_part({}, llama_part, spec, open_source(folder))
    assert "missing (1): model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "unknown (1): model.layers.2.mlp.up_proj.weight (nearest missing: model.layers.1" in str(error.value)


def test_another_shape_names_tensor_found_and_expected(tiny_llama, llama_part):
    folder, spec, state = tiny_llama
    target = empty_state(llama_part, spec, open_source(folder).part("text_decoder"))
    save_file({**state, "model.layers.1.mlp.down_proj.weight": torch.zeros(8, 13)}, folder / "model.safetensors")
    with pytest.raises(
        WeightError, match=r"model.layers.1.mlp.down_proj.weight gives .* \[8, 13\]; expected \[8, 12\]"
    ):
        load_part(target, llama_part, spec, open_source(folder))


def test_another_vocabulary_is_refused(tiny_llama, llama_part):
    folder, spec, state = tiny_llama
    target = empty_state(llama_part, spec, open_source(folder).part("text_decoder"))
    save_file({**state, "lm_head.weight": torch.zeros(12, 8)}, folder / "model.safetensors")
    with pytest.raises(WeightError, match="lm_head.weight has 12 rows; expected language_vocab_size 11"):
        load_part(target, llama_part, spec, open_source(folder))


def test_quantised_weights_are_refused(tiny_llama, llama_part):
    folder, spec, state = tiny_llama
    target = empty_state(llama_part, spec, open_source(folder).part("text_decoder"))
    save_file({**state, "model.norm.weight": torch.zeros(8, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(WeightError, match="model.norm.weight has type torch.int8; expected floating point"):
        load_part(target, llama_part, spec, open_source(folder))


def test_a_module_that_its_rules_do_not_describe_is_refused(tiny_llama, llama_part):
    folder, spec, _ = tiny_llama
    target = empty_state(llama_part, spec, open_source(folder).part("text_decoder"))
    target["decoder.bias"] = target.pop("decoder.final_layernorm.weight")
    with pytest.raises(WeightError, match=r"without a rule: \['decoder.bias'\], without a tensor: \['decoder.final"):
        load_part(target, llama_part, spec, open_source(folder))


def test_names_of_another_family_are_refused(golden_models, golden_spec, llama_part):
    from dataclasses import replace

    part = replace(llama_part, rules={"ours": llama_part.rules["ours"]})
    with pytest.raises(WeightError, match="names of kind 'hf', which model_id 'llama' cannot read; expected ours"):
        load_part({}, part, golden_spec.text_decoder, open_source(golden_models / "vicuna"))


@pytest.fixture
def tied(tiny_llama):
    """(folder, spec, HF tensors) of a tied model that stores its head all the same."""
    folder, _, state = tiny_llama
    config = {**TINY_LLAMA, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    return folder, llama.from_hf(config), state


def test_a_tied_head_is_not_loaded_twice(tied, llama_part):
    folder, spec, _ = tied
    state, report = load(llama_part, spec, folder)
    assert "output_layer.weight" not in state and report.dropped == 1


def test_the_last_stage_of_a_tied_model_gets_the_embedding(tied, llama_part):
    folder, spec, tensors = tied
    stage = {"output_layer.weight": torch.full((11, 8), float("nan"))}
    load_part(stage, llama_part, spec, open_source(folder), layer_offset=1, num_local_layers=1)
    assert torch.equal(stage["output_layer.weight"], tensors["model.embed_tokens.weight"])


def test_a_tied_head_that_differs_is_refused(tied, llama_part):
    folder, spec, state = tied
    save_file({**state, "lm_head.weight": torch.zeros(11, 8)}, folder / "model.safetensors")
    with pytest.raises(WeightError, match='lm_head.weight differs .*"tie_word_embeddings": false in its config.json'):
        load_part({}, llama_part, spec, open_source(folder))
