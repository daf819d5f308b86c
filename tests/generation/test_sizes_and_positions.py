"""Images with different numbers of features, tags around them, and positions of three axes, on a toy family.

Its images are cut into one to three tiles by their aspect ratio. Positions follow the idea of Qwen2-VL: the features of
an image stand at the same time, in rows and columns, and what follows goes on behind the largest position.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mindspeed_mm as mm
from mindspeed_mm import registry
from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.image import ImageError, load_image
from mindspeed_mm.data.media import ItemPlan, MediaProcessor
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.families.llava import Llava
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.spec import FAMILIES
from mindspeed_mm.platform import get_platform
from tests.helpers.golden_model import model_json

get_platform("cpu")  # before megatron.core is imported

PER_TILE, SIDE, OPEN, CLOSE, OWN_ID = 16, 4, 501, 502, 777


class Tiles(MediaProcessor):
    """One tile for each width that is as long as the height, at most three."""

    fixed = None

    def __init__(self, square):
        self._square = square

    def plan(self, height, width):
        if width > 6 * height:
            raise ImageError(f"an image is {width} x {height}, which is too wide; crop it")
        tiles = min(3, max(1, width // height))
        return ItemPlan((1, SIDE, SIDE * tiles), (OPEN, *[IMAGE_TOKEN_INDEX] * (PER_TILE * tiles), CLOSE))

    def item(self, image):
        image = image if isinstance(image, Image.Image) else load_image(image)
        grid = self.plan(image.height, image.width).grid
        tiles = grid[2] // SIDE
        edges = [image.width * tile // tiles for tile in range(tiles + 1)]
        cut = [image.crop((left, 0, right, image.height)) for left, right in zip(edges[:-1], edges[1:], strict=True)]
        pixels = torch.cat([self._square.item(tile).pixels for tile in cut])
        return Media(pixels, (tiles,), torch.tensor([grid]), torch.zeros(1, 2, dtype=torch.int64))

    @property
    def config(self):
        return self._square.config

    @property
    def settings(self):
        return self._square.settings | {"tiles": 3}


class TiledFamily(Llava):
    name, model_types, layouts, multimodal_positions = "tiled", (), (), True

    def pads(self, config):
        return False

    def fixed_plan(self, spec):
        return None

    def token_ids(self, token_to_id):
        return {"image_token_id": OWN_ID}

    def image_token_id(self, config):
        return config.get("image_token_id")

    def media_processor(self, spec, image_processor, *, pad=False, fast_resize=False):
        if pad:
            raise ConfigError("model_id tiled pads no images")
        return Tiles(super().media_processor(spec, image_processor, fast_resize=fast_resize))

    def media_of_inputs(self, spec, inputs):
        if not inputs:
            return None
        tiles = inputs["image_tiles"].tolist()
        grid = torch.tensor([[1, SIDE, SIDE * count] for count in tiles])
        return Media(inputs["pixel_values"], tuple(tiles), grid, torch.zeros(len(tiles), 2, dtype=torch.int64))

    def item_counts(self, spec, media):
        return media.grid.prod(1).tolist()

    def positions(self, spec, input_ids, grids):
        found, position, grids = [], 0, iter(grids.tolist())
        index = 0
        while index < len(input_ids):
            if input_ids[index] != IMAGE_TOKEN_INDEX:
                found.append([position] * 3)
                position, index = position + 1, index + 1
                continue
            _, height, width = next(grids)
            found += [[position, position + y, position + x] for y in range(height) for x in range(width)]
            position, index = position + max(height, width), index + height * width
        assert next(grids, None) is None
        return torch.tensor(found).t()


@pytest.fixture(scope="module")
def vlm(golden, tmp_path_factory):
    from mindspeed_mm.models.kit.rotary import RotaryEmbedding

    registry.register(FAMILIES, "tiled", TiledFamily())
    path = tmp_path_factory.mktemp("tiled") / "model.json"
    path.write_text(json.dumps({"model_id": "tiled", **model_json(golden)}))
    try:
        loaded = mm.load(
            path, device="cpu", tokenizer=golden / "tokenizer", image_processor=golden / "models" / "clip_hf"
        )
        loaded.model.text_decoder.rotary = RotaryEmbedding(16, 10000.0, None, max_positions=2048, sections=(2, 3, 3))
        yield loaded
    finally:
        registry._REGISTERED[FAMILIES].pop("tiled")


def image_of(number):
    """One, two or three tiles, each of its own colours."""
    image = Image.new("RGB", (30 * (1 + number % 3), 30), (200, 40 * number, 90))
    image.paste((10, 200, 30 * number), (5, 5, 20 + number, 25))
    return image


TEXTS = ("Hi", "What is it?", "word " * 25, "word " * 25 + "and so on")
SHOWN = ((), (0,), (1, 2), (2,), (0, 2), (1,))
OPTIONS = (
    {"max_new_tokens": 6, "eos_token_id": -1},
    {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2},
    {"max_new_tokens": 6, "do_sample": True, "temperature": 1.4, "num_return_sequences": 3},
)


def request(index):
    from mindspeed_mm.generation.engine import GenerationRequest

    images = tuple(image_of(number) for number in SHOWN[index % 6])
    return GenerationRequest(str(index), turns=((TEXTS[index % 4], None),), images=images)


def rows(result):
    return [sequence.token_ids for sequence in result.sequences]


def inputs_of(vlm, images):
    media = [vlm.media.item(image) for image in images]
    if not media:
        return {}
    return {
        "pixel_values": torch.cat([item.pixels for item in media]),
        "image_tiles": torch.tensor([item.rows[0] for item in media]),
    }


@pytest.mark.parametrize("index", range(6))
def test_greedy_tokens_equal_the_logits_of_whole_sequences(vlm, index):
    """Without cache: positions of the whole sequence, answer included, are the family's own."""
    engine, asked = vlm.engine(), request(index)
    ids = engine.prepare(asked)
    inputs, wanted = inputs_of(vlm, asked.images), []
    for _ in range(6):
        wanted.append(int(vlm.logits(torch.tensor([[*ids, *wanted]]), **inputs)[0, -1].argmax()))
    assert rows(engine.submit(asked, OPTIONS[0]).wait()) == [tuple(wanted)]


def test_positions_matter_to_the_toy(vlm, monkeypatch):
    """Without the family's positions other logits come out, or the tests here would prove nothing."""
    asked = request(1)
    ids, inputs = torch.tensor([vlm.engine().prepare(asked)]), inputs_of(vlm, asked.images)
    own = vlm.logits(ids, **inputs)
    monkeypatch.setattr(TiledFamily, "multimodal_positions", False)
    assert (vlm.logits(ids, **inputs) - own)[:, -1].abs().max() > 1e-3


def test_plans_decide_the_prompt(vlm):
    ids = vlm.engine().prepare(request(2))
    assert ids.count(OPEN) == ids.count(CLOSE) == 2 and ids.count(IMAGE_TOKEN_INDEX) == (2 + 3) * PER_TILE
    first = ids.index(OPEN)
    assert ids[first + 1 : first + 33] == [IMAGE_TOKEN_INDEX] * 32 and ids[first + 33] == CLOSE


@pytest.fixture(scope="module")
def alone(vlm):
    """Answers of engines that have seen nothing before."""
    return [[rows(vlm.engine().submit(request(i), options).wait()) for options in OPTIONS] for i in range(12)]


@pytest.fixture(scope="module")
def engine(vlm):
    return vlm.engine(batch_size=4)


@settings(max_examples=20, deadline=None)
@given(
    order=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 2)), min_size=2, max_size=10),
    size=st.integers(1, 6),
    pause=st.integers(0, 4),
    packs=st.booleans(),
)
def test_tokens_do_not_depend_on_the_batch_nor_on_what_was_asked_before(engine, alone, order, size, pause, packs):
    engine._scheduler.max_rows, engine._decoder.packs = size, packs
    handles = []
    for index, kind in order:
        handles.append((index, kind, engine.submit(request(index), OPTIONS[kind])))
        for _ in range(pause):
            engine.step()
    for index, kind, handle in handles:
        assert rows(handle.wait()) == alone[index][kind]


def test_a_turn_goes_on_where_the_last_one_ended(vlm):
    from mindspeed_mm.generation.chat import ChatSession

    session = ChatSession(vlm.engine(batch_size=1), {"max_new_tokens": 8})
    fresh = ChatSession(vlm.engine(), {"max_new_tokens": 8})
    for talk in (session, fresh):
        talk.add_image("a", image_of(2))
    for question in ("What is it?", "And where?", "Why?"):
        before = session.result
        list(session.ask(question))
        if before is not None:
            assert session.result.cached_tokens >= before.prompt_tokens
        fresh._engine = vlm.engine()
        list(fresh.ask(question))
        assert session.result.token_ids == fresh.result.token_ids and fresh.result.cached_tokens == 0


def test_an_image_between_tags_is_taken_whole_or_not_at_all(vlm):
    """The images' tiles are alike, so their keys are the first thing that differs."""
    from mindspeed_mm.generation.engine import GenerationRequest

    engine, text = vlm.engine(), "word " * 20
    asked = [GenerationRequest(str(n), prompt=f"{text}<image>?", images=(image_of(n),)) for n in (2, 5)]
    first = engine.submit(asked[0], OPTIONS[0]).wait()
    other = engine.submit(asked[1], OPTIONS[0]).wait()
    start = engine.prepare(asked[1]).index(IMAGE_TOKEN_INDEX)
    assert first.cached_tokens == 0 and other.cached_tokens == start
    assert rows(other) == rows(vlm.engine().submit(asked[1], OPTIONS[0]).wait())


@pytest.mark.parametrize(
    "start, expected",
    [(1, (1, 0)), (2, (2, 0)), (3, (2, 0)), (5, (5, 1)), (7, (7, 1)), (8, (7, 1)), (9, (9, 2)), (10, (10, 2))],
)
def test_a_beginning_ends_in_front_of_an_image_that_it_would_cut(start, expected):
    from mindspeed_mm.generation.images import FoundImage
    from mindspeed_mm.generation.prefix import whole_images

    prompt = [1, OPEN, *[IMAGE_TOKEN_INDEX] * 3, CLOSE, OPEN, *[IMAGE_TOKEN_INDEX] * 2, CLOSE]
    images = [FoundImage(bytes(16), None, ItemPlan((1, 1, n), (IMAGE_TOKEN_INDEX,) * n)) for n in (3, 2)]
    assert whole_images(prompt, images, start) == expected


def test_images_of_different_counts_go_through_the_vision_encoder_together(vlm, monkeypatch):
    engine = vlm.engine(batch_size=8)
    calls, compute = [], engine._decoder.image_features
    monkeypatch.setattr(
        engine._decoder, "image_features", lambda media: (calls.append([m.rows[0] for m in media]), compute(media))[1]
    )
    from mindspeed_mm.generation.engine import GenerationRequest

    images = tuple(map(image_of, range(3)))
    engine.submit(GenerationRequest("a", prompt="<image>" * 3 + "Hi", images=images), OPTIONS[0]).wait()
    assert calls == [[1, 2, 3]] and engine.image_features.computed == 3


def test_rows_or_features_bound_what_the_vision_encoder_takes():
    from mindspeed_mm.generation.images import _groups

    assert list(_groups({b"a": 5, b"b": 5, b"c": 9, b"d": 30, b"e": 1}, 10)) == [[b"a", b"b"], [b"c"], [b"d"], [b"e"]]


@pytest.mark.parametrize(
    "size, message",
    [
        ((70, 10), "an image is 70 x 10, which is too wide; crop it"),
        ((0, 5), "an image is 0 x 5 pixels, which is none"),
    ],
)
def test_an_image_of_no_use_fails_its_request_alone(vlm, alone, size, message):
    from mindspeed_mm.generation.engine import GenerationRequest

    engine = vlm.engine()
    good = engine.submit(request(1), OPTIONS[0])
    bad = engine.submit(GenerationRequest("b", prompt="<image>Hi", images=(Image.new("RGB", size),)), OPTIONS[0])
    with pytest.raises(ImageError, match=message):
        bad.wait()
    assert rows(good.wait()) == alone[1][0]


def test_files_that_hold_no_size_fail_their_request_alone(vlm, alone, tmp_path):
    from mindspeed_mm.generation.engine import GenerationRequest

    (tmp_path / "a.png").write_text("no image")
    engine = vlm.engine()
    good = engine.submit(request(3), OPTIONS[0])
    for path, message in (("a.png", "cannot be decoded"), ("b.png", "is missing")):
        bad = engine.submit(GenerationRequest("b", prompt="<image>Hi", images=(tmp_path / path,)), OPTIONS[0])
        with pytest.raises(ImageError, match=message):
            bad.wait()
    assert rows(good.wait()) == alone[3][0]


@pytest.mark.parametrize("left", [True, False])
def test_logits_of_a_padded_batch_are_those_of_each_row(vlm, left):
    asked = [request(index) for index in (2, 0, 3)]
    prompts = [vlm.engine().prepare(one) for one in asked]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    ids[ids == IMAGE_TOKEN_INDEX] = OWN_ID  # the family's own id, from the tokenizer
    found = vlm.logits(ids, mask, **inputs_of(vlm, [image for one in asked for image in one.images]))
    for row, (prompt, one) in enumerate(zip(prompts, asked, strict=True)):
        wanted = vlm.logits(torch.tensor([prompt]), **inputs_of(vlm, one.images))[0]
        torch.testing.assert_close(found[row, mask[row].bool()], wanted, atol=2e-5, rtol=1e-4)


def test_a_row_that_ends_inside_an_image_is_refused(vlm):
    ids = torch.tensor([[1] + [-200] * 20, [1] + [-200] * 12 + [5] * 8])
    with pytest.raises(ConfigError, match="row 0 of input_ids holds 20 image positions, which are not those of whole"):
        vlm.logits(ids, **inputs_of(vlm, [image_of(0), image_of(3)]))


def test_ids_are_continued_with_one_placeholder_an_image_or_expanded(vlm):
    images = [image_of(2), image_of(0), image_of(1)]
    short = [[1, OPEN, OWN_ID, CLOSE, 300, OPEN, OWN_ID, CLOSE, 301], [1, 310, OPEN, OWN_ID, CLOSE]]
    counts = iter((48, 16, 32))
    full = [[same for t in row for same in ([OWN_ID] * next(counts) if t == OWN_ID else [t])] for row in short]
    options = {"images": images, "max_new_tokens": 5, "eos_token_id": -1}
    together = vlm.generate(input_ids=full, **options)
    assert vlm.generate(input_ids=short, **options) == together
    one = vlm.generate(input_ids=full[1], **options | {"images": images[2:]})
    ids = torch.tensor(full[1:])
    assert one == together[1:] and one[0][0] == int(vlm.logits(ids, **inputs_of(vlm, images[2:]))[0, -1].argmax())
    with pytest.raises(ConfigError, match="input_ids hold another number of image positions than their images have"):
        vlm.generate(input_ids=[[1, *[OWN_ID] * 20], [1, *[OWN_ID] * 76]], **options)


def test_prompts_are_answered_about_images_of_any_size(vlm):
    assert len(vlm.generate(["What?", "And this?"], [[image_of(1)], []], max_new_tokens=3)) == 2


def test_what_asks_for_one_size_is_refused(vlm):
    message = "model_id tiled has no one number of tokens an image"
    with pytest.raises(ConfigError, match=message):
        vlm.tokens_per_image  # noqa: B018
    with pytest.raises(ConfigError, match=message):
        vlm.vision_features(torch.zeros(2, 3, 56, 56))
    with pytest.raises(ConfigError, match=message):
        vlm.project(torch.zeros(2, 16, 64))
    with pytest.raises(ConfigError, match="takes images of any size, which `mm.preprocess` does not make"):
        vlm.image_processor  # noqa: B018
    with pytest.raises(ImageError, match="found a tensor as an image; this model takes images of any size"):
        vlm.generate(input_ids=[1, OWN_ID], images=[torch.zeros(3, 56, 56)])
