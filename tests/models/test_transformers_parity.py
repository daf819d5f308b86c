"""Random tiny models made and saved by transformers, loaded by us: equal logits for every variant of the decoder."""

import pytest
import torch
import transformers

import mindspeed_mm as mm

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "rope base": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    "rope llama3": {"rope_parameters": LLAMA3},
    "norm eps": {"rms_norm_eps": 1e-3},
    "head size": {"head_dim": 12},
}


def save_random_llava(folder, text: dict, **options) -> transformers.LlavaForConditionalGeneration:
    """A LlavaForConditionalGeneration with random weights, saved to `folder`; biases and norms are random, too."""
    torch.manual_seed(7)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**(TEXT | text)),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=130,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        **options,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def batch(images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids [1, S] with 4 image positions an image, pixel_values)."""
    torch.manual_seed(1)
    image = torch.full((1, 4), 130)
    pieces = [
        torch.randint(3, 130, (1, 9)),
        image,
        torch.randint(3, 130, (1, 30)),
        image,
        torch.randint(3, 130, (1, 5)),
    ]
    return torch.cat(pieces, dim=1), torch.randn(images, 3, 28, 28)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, tmp_path):
    model = save_random_llava(tmp_path, VARIANTS[variant])
    ids, pixels = batch()
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
    vlm = mm.load(tmp_path, device="cpu")
    torch.testing.assert_close(vlm.logits(ids, None, pixels), expected, atol=2e-5, rtol=1e-4)


def test_class_token_is_kept_on_demand(tmp_path):
    model = save_random_llava(tmp_path, {}, vision_feature_select_strategy="full", vision_feature_layer=-1)
    _, pixels = batch()
    vlm = mm.load(tmp_path, device="cpu")
    with torch.no_grad():
        vision_encoder = model.model.vision_tower
        hidden = vision_encoder(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(vlm.vision_features(pixels), hidden, atol=2e-5, rtol=1e-4)


def test_last_patch_reaches_the_first_token(tmp_path):
    """The vision encoder is not causal (megatron.core's own local ViT spec is)."""
    save_random_llava(tmp_path, {})
    vlm = mm.load(tmp_path, device="cpu")
    _, pixels = batch(1)
    changed = pixels.clone()
    changed[..., -14:, -14:] += 1.0
    moved = (vlm.vision_features(pixels) - vlm.vision_features(changed)).abs()
    assert moved[:, 0].max() > 1e-3


def test_unused_last_layer_is_not_built(tmp_path):
    save_random_llava(tmp_path, {})
    vlm = mm.load(tmp_path, device="cpu")
    assert len(vlm.model.image_encoder.encoder.decoder.layers) == VISION["num_hidden_layers"] - 1


def test_greedy_text_equals_transformers(tmp_path):
    model = save_random_llava(tmp_path, {"num_key_value_heads": 2})
    ids, pixels = batch()
    expected = model.generate(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    vlm = mm.load(tmp_path, device="cpu")
    found = vlm.generate(input_ids=ids, images=pixels, max_new_tokens=12, eos_token_id=-1)
    assert found[0] == expected[0, ids.shape[1] :].tolist()
