"""Letter B: the original code's other ways to put tiles together (mm_patch_merge_type flat, spatial) are done."""

import json

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.families.llava_next import LLAVA_NEXT_HF
from mindspeed_mm.models.spec import find_family
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_llava import (
    IMAGE_ID,
    SIZES,
    clip,
    close,
    image,
    inputs,
    llava_next,
    sample,
    save_original,
    their_greedy,
    their_loss,
)
from tests.helpers.vlm_ranks import GRADIENT, STEP, compare, stored, train, trained

FAMILY = find_family("llava_next")


def flat(tiles, config):
    """[T, P, H] of one image as the original code's flat has it: the whole image, then tile behind tile."""
    return tiles.flatten(0, 1)


def spatial(tiles, config, grid):
    """As its spatial has it: the whole image, then the lines of all tiles, nothing cut off and nothing between them."""
    side = int(tiles.shape[1] ** 0.5)
    lines = [
        tiles[1 + row * grid[1] + column, line * side : (line + 1) * side]
        for row in range(grid[0])
        for line in range(side)
        for column in range(grid[1])
    ]
    return torch.cat((tiles[0], *lines))


def reference(merge):
    """transformers' model without its newline vector, whose tiles are put together in plain steps."""
    theirs = llava_next(clip())

    def pack(features, sizes, vision_feature_select_strategy=None, image_newline=None):
        config, found = theirs.config, []
        from mindspeed_mm.models.tiles import tile_grid

        for tiles, size in zip(features, sizes.tolist(), strict=True):
            grid = tile_grid(tuple(size), config.image_grid_pinpoints, config.vision_config.image_size)
            found.append(flat(tiles, config) if merge == "flat" else spatial(tiles, config, grid))
        return found, torch.tensor([len(own) for own in found])

    theirs.model.pack_image_features = pack
    return theirs


@pytest.fixture(scope="module", params=["flat", "spatial"])
def pair(request, tmp_path_factory):
    """(mm_patch_merge_type, the reference, the original code's folder of it)."""
    theirs = reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, theirs, save_original(theirs, folder, newline=False, mm_patch_merge_type=request.param)


def ours_of(vlm, given):
    """Logits of ours for what transformers takes; the original layout has no id for an image."""
    return vlm.logits(**(given | {"input_ids": given["input_ids"].masked_fill(given["input_ids"] == IMAGE_ID, -200)}))


def test_letter_b_logits_and_text_of_other_merges(pair):
    merge, theirs, folder = pair
    vlm = mm.load(folder, device="cpu")
    assert vlm.spec.vision_projector.mm_patch_merge_type == merge
    assert vlm.media.plan(20, 90).count == 16 * 4 and vlm.media.plan(60, 60).count == 16 * 5
    encoded = sample(vlm.media, [image(*size) for size in SIZES], (7, 3, 1, 4, 5))
    given = inputs(FAMILY, vlm.spec, encoded)
    with torch.no_grad():
        close(ours_of(vlm, given), theirs(**given).logits)
    answer = vlm.generate(
        input_ids=encoded.input_ids, images=[image(*size) for size in SIZES], max_new_tokens=9, eos_token_id=-1
    )
    assert answer == [their_greedy(theirs, given)]


LAYOUTS = {
    "one rank packed": GoldenLayout(packed=True),
    "TP2 PP2": GoldenLayout(tensor=2, pipeline=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_letter_b_gradients_of_other_merges(pair, ranks, name, tmp_path):
    _, theirs, folder = pair
    spec = mm.load(folder, device="cpu").spec
    media = FAMILY.media_processor(spec, folder / "encoder")
    samples = [
        sample(media, [image(30, 50), image(90, 20)], (6, 9, 5), seed=1),
        sample(media, [], (23,), seed=5),
        sample(media, [image(1, 7)], (4, 12), seed=9),
    ]
    theirs.zero_grad()
    their_loss(theirs, FAMILY, spec, samples).backward()
    wanted = {key: tensor.grad for key, tensor in stored(theirs, LLAVA_NEXT_HF).items() if tensor.grad is not None}
    layout = LAYOUTS[name]
    ranks(layout.ranks).run(train, str(folder), layout, samples, str(tmp_path), 1, GRADIENT)
    before = {key: tensor.detach() for key, tensor in stored(theirs, LLAVA_NEXT_HF).items()}
    after = trained(tmp_path, spec, LLAVA_NEXT_HF)
    assert "image_newline" not in after
    compare({key: (before[key] - tensor[: len(before[key])]) / STEP for key, tensor in after.items()}, wanted)


def test_letter_b_other_merges_are_converted(pair, tmp_path):
    merge, theirs, folder = pair
    mm.convert(folder, tmp_path / "ours", to="mindspeed-mm")
    mm.convert(tmp_path / "ours", tmp_path / "back", to="llava")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mm_patch_merge_type"] == merge
    again = mm.load(tmp_path / "back", device="cpu")
    given = inputs(FAMILY, again.spec, sample(again.media, [image(30, 50)], (5, 6)))
    with torch.no_grad():
        close(ours_of(again, given), theirs(**given).logits[..., :IMAGE_ID])  # <image> is not in LLaVA's vocabulary
    with pytest.raises(WeightError, match=f'mm_patch_merge_type is "{merge}"; transformers knows spatial_unpad alone'):
        mm.convert(folder, tmp_path / "hf", to="llava_next")
