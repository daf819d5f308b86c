"""The post-interaction block in training: every layout gives the run on one process, and only what is open moves."""

import pytest
import torch

from tests.helpers.golden_training import full_tensors, records
from tests.interaction.post_block_helpers import with_block, write_block, write_model
from tests.parallel.test_command import COMMON, LAYOUTS, describe_data, folder, train  # noqa: F401  a fixture

FLAGS = "--train-iters 2"


def describe(golden, place, trained, **block):
    block = {"ckpt_path": str(write_block(place / "block.pt")), "freeze": "interaction" not in trained} | block
    write_model(place, with_block(golden, trained, **block))


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
def test_every_layout(ranks, golden, folder, packing):  # noqa: F811
    describe_data(golden, folder, packing)
    describe(golden, folder, ("text_decoder", "vision_projector", "interaction"))
    assert ranks(1).run(train, str(folder), "one", FLAGS) == [0]
    wanted = records(folder / "one")
    layouts = {"TP2 SP", "PP2"} if packing else {"CP2", "PP2 VPP2"}
    for name in sorted(layouts):
        assert ranks(2).run(train, str(folder), name, f"{FLAGS} {LAYOUTS[name]}") == [0, 0], name
        found = records(folder / name)
        for key in ("loss", "grad_norm", "supervised"):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in wanted], rel=1e-5), (name, key)


@pytest.mark.parametrize("layout", ["PP2", pytest.param("TP2 SP", marks=pytest.mark.slow)])
def test_the_block_alone_is_trained(ranks, golden, folder, layout):  # noqa: F811
    describe_data(golden, folder)
    describe(golden, folder, ("interaction",))
    assert ranks(1).run(train, str(folder), "one", FLAGS) == [0]
    assert ranks(2).run(train, str(folder), "two", f"{FLAGS} {LAYOUTS[layout]}") == [0, 0]
    norms = [[r["grad_norm"] for r in records(folder / name)] for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    wanted, found = full_tensors(folder / "one"), full_tensors(folder / "two")
    assert any(name.startswith("interaction.") for name in wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_a_trained_encoder_behind_a_pipeline_is_refused(golden, folder, monkeypatch, capsys):  # noqa: F811
    from mindspeed_mm.cli.main import main

    describe_data(golden, folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    files = ["--mm-model", str(folder / "model.json"), "--mm-data", str(folder / "data.json"), *COMMON.split()]
    for trained, features in (("vision_encoder", "vision_encoder"), ("vision_projector", "vision_projector")):
        describe(golden, folder, (trained,), features=features, ckpt_path=None)
        assert main(["train", *files, *LAYOUTS["PP2"].split()]) != 0
        assert f"image_encoder.{trained} is trained, and an interaction looks at its" in capsys.readouterr().err
