"""The post-interaction block on two ranks: the same answers as on one, and its forms without cross-attention trained at
every layout."""

import pytest
import torch

from tests.helpers.golden_training import records
from tests.interaction.post_block_helpers import with_block, write_block, write_model
from tests.parallel.test_command import LAYOUTS, describe_data, folder, train  # noqa: F401  a fixture

TEXT = {"cross_attention": False, "self_attention": True, "num_layers": 2}
ALONE = {"cross_attention": False}
FORMS = {"cross": {}, "text": TEXT, "alone": ALONE}


def write_form(place, **block) -> str:
    """Weights of a form; their path."""
    form = {"cross": block.get("cross_attention", True), "text": block.get("self_attention", False)}
    return str(write_block(place / "block.pt", depth=block.get("num_layers", 1), **form))


def tokens(places, tensor, pipeline):
    """What this rank generates with each model: prompts of unequal lengths, and beams that go on from one of them."""
    import mindspeed_mm as mm

    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    first, second = [1, *[-200] * 16, 400, 401, 402], [1, *range(300, 330)]
    found = []
    for place in places:
        vlm = mm.load(place / "model.json", device="cpu", **sizes)
        options = {"max_new_tokens": 5, "eos_token_id": -1}
        rows = vlm.generate(input_ids=[first, second], images=images, **options)
        beams = vlm.generate(input_ids=[[*first, *rows[0], 7]], images=images, num_beams=2, **options)
        found.append((rows, beams))
    return found


def test_generation(ranks, golden, tmp_path):
    places = [tmp_path / name for name in FORMS]
    for place, block in zip(places, FORMS.values(), strict=True):
        place.mkdir()
        write_model(place, with_block(golden, ckpt_path=write_form(place, **block), **block))
    (single,) = ranks(1).run(tokens, places, 1, 1)
    assert single[0] != single[1] != single[2]
    for tensor, pipeline in ((2, 1), (1, 2)):
        assert ranks(2).run(tokens, places, tensor, pipeline) == [single, single]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("form", ["text", "alone"])
def test_forms_that_look_at_no_image_at_every_layout(ranks, golden, folder, form, packing):  # noqa: F811
    """No features travel for them, so the encoder and the projector may be trained over stages."""
    describe_data(golden, folder, packing)
    trained, block = ("text_decoder", "vision_encoder", "vision_projector"), FORMS[form]
    write_model(folder, with_block(golden, trained, ckpt_path=write_form(folder, **block), **block))
    assert ranks(1).run(train, str(folder), "one", "--train-iters 2") == [0]
    wanted = records(folder / "one")
    for name in ("TP2 SP", "PP2", "CP2", "PP2 VPP2") if packing else ("TP2 SP", "CP2"):
        assert ranks(2).run(train, str(folder), name, f"--train-iters 2 {LAYOUTS[name]}") == [0, 0], name
        found = records(folder / name)
        for key in ("loss", "grad_norm", "supervised"):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in wanted], rel=1e-5), (name, key)


def test_heads_that_context_parallel_ranks_cannot_share(golden):
    from mindspeed_mm.models.complete import read_model
    from mindspeed_mm.models.parallel import layout_problems
    from mindspeed_mm.models.runtime import Runtime

    spec = read_model(with_block(golden, **TEXT, num_attention_heads=3))
    (problem,) = layout_problems(spec, Runtime(context_parallel_size=2))
    assert problem.startswith("interaction.num_attention_heads 3 cannot be split over --tensor-model-parallel-size 1 x")
