"""The table at the start of a run: parameters, learning rates and optimizer memory of each part."""

import argparse

import pytest

from tests.parallel.test_command import COMMON, describe_data, folder  # noqa: F401  a fixture

LORA = "--lora-r 3 --lora-target-modules q_proj down_proj --loraplus-lr-ratio 16 --mm-projector-lr 1e-4"


@pytest.mark.parametrize(
    ("flags", "values"),
    [("", 2), ("--bf16", 3), ("--bf16 --ema-decay 0.9", 4), ("--optimizer muon", None)],
    ids=["fp32", "bf16", "average", "Muon"],
)
def test_the_table(golden, folder, flags, values):  # noqa: F811
    """`values` of 4 bytes for each trained parameter; Muon keeps one for A, B and the projector's matrices."""
    from mindspeed_mm.cli.train import add_arguments, prepared
    from mindspeed_mm.trainer.plan_verdict import trained_table

    describe_data(golden, folder)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    files = ["--mm-model", f"{folder}/model.json", "--mm-data", f"{folder}/data.json"]
    inputs = prepared(parser.parse_args([*files, *COMMON.split(), *LORA.split(), *flags.split()])).inputs
    rows = {line.split()[0]: line.split() for line in trained_table(inputs).splitlines()[1:]}
    text, vision, projector = (rows[name] for name in ("text_decoder", "vision_encoder", "vision_projector"))
    decoder = inputs.spec.text_decoder
    width = decoder.hidden_size
    pairs = decoder.num_layers * 3 * (2 * width + width + decoder.ffn_hidden_size)
    assert int(text[2].replace(",", "")) == pairs and vision[2] == "0" and vision[-1] == "-"
    sizes = inputs.spec.vision_projector
    matrices = sizes.input_size * sizes.ffn_hidden_size + sizes.ffn_hidden_size * sizes.hidden_size
    whole = matrices + sizes.ffn_hidden_size + sizes.hidden_size
    assert int(projector[2].replace(",", "")) == whole
    for row, trained, own in ((text, pairs, pairs), (projector, whole, matrices)):
        held = 4 * (trained * values if values else 2 * trained - own)
        assert row[3:5] == [f"{held / 1e9:.3f}", "GB"]
    assert text[5:] == ["0.001,", "0.016"] and projector[5:] == ["0.0001"]
