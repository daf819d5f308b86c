"""data.json: the ancestor's files load; what cannot be done is refused with the reason."""

import copy

import pytest

from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.errors import ConfigError

# The keys and values that MindSpeed-MM 2.0 ships for LLaVA-1.5 (facts: shape of data.json).
ANCESTOR = {
    "dataset_param": {
        "dataset_type": "multimodal",
        "basic_parameters": {"data_path": "blip_laion_cc_sbu_558k.json", "data_folder": "images"},
        "preprocess_parameters": {
            "image_reader_type": "CLIPImageProcessor",
            "train_pipeline": {
                "crop_size": {"height": 336, "width": 336},
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "pad2square": False,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "rescale_factor": 0.00392156862745098,
                "size": {"shortest_edge": 336},
            },
        },
        "tokenizer_config": {
            "hub_backend": "hf",
            "autotokenizer_name": "AutoTokenizer",
            "from_pretrained": "vicuna-7b-v1.5",
            "cache_dir": None,
            "padding_side": "right",
            "use_fast": False,
        },
        "use_text_processer": True,
        "template_name": "llava-plain",
        "mm_use_im_start_end": False,
    },
    "dataloader_param": {
        "dataloader_mode": "sampler",
        "shuffle": True,
        "drop_last": True,
        "pin_memory": True,
        "sampler_type": "BaseRandomBatchSampler",
        "collate_param": {"model_name": "llava", "pad_token_id": 0},
    },
}


def changed(path: str, value) -> dict:
    """ANCESTOR with one value set; "-" as the value removes the key."""
    data = copy.deepcopy(ANCESTOR)
    *parents, last = path.split(".")
    node = data
    for name in parents:
        node = node[name]
    if value == "-":
        del node[last]
    else:
        node[last] = value
    return data


def test_the_ancestors_file():
    config = DataConfig.load(ANCESTOR)
    preprocessing = config.dataset_param.preprocess_parameters
    assert ImageProcessor.from_config(preprocessing.processor_source).output_size == (336, 336)
    assert preprocessing.pad is False
    assert config.dataset_param.basic_parameters[0].data_folder == "images"
    assert config.dataset_param.dataset_kind == "llava"
    assert config.dataset_param.tokenizer_config.from_pretrained == "vicuna-7b-v1.5"
    assert config.dataloader_param.collate_param.pad_token_id == 0


def test_variants():
    both = [{"data_path": "a.json"}, {"data_path": "b.jsonl", "data_folder": "b", "repeat_time": 2}]
    config = DataConfig.load(changed("dataset_param.basic_parameters", both))
    assert [basic.repeat_time for basic in config.dataset_param.basic_parameters] == [1, 2]
    padded = DataConfig.load(changed("dataset_param.preprocess_parameters.train_pipeline.pad2square", True))
    assert padded.dataset_param.preprocess_parameters.pad is True
    assert DataConfig.load(changed("dataset_param.dataset_type", "image")).dataset_param.dataset_kind == "llava"


def test_an_image_processor_folder(golden):
    parameters = {"image_processer_path": str(golden / "models/clip_hf"), "pad2square": True}
    config = DataConfig.load(changed("dataset_param.preprocess_parameters", parameters))
    assert config.dataset_param.preprocess_parameters.pad is True
    source = config.dataset_param.preprocess_parameters.processor_source
    assert ImageProcessor.from_config(source).output_size == (56, 56)


def test_the_smallest_maximum_length_counts():
    assert DataConfig.load(ANCESTOR).max_length(2048) == 2048
    config = DataConfig.load(changed("dataset_param.tokenizer_config.model_max_length", 512))
    assert (config.max_length(2048), config.max_length(256)) == (512, 256)
    config = DataConfig.load(changed("dataloader_param.collate_param.model_max_length", 128))
    assert config.max_length(2048) == 128


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dataset_param.template_nam", "v1", 'template_nam: unknown key; did you mean "template_name"'),
        ("dataset_param.template_name", "llava-plane", 'unknown template "llava-plane"; did you mean "llava-plain"'),
        ("dataset_param.dataset_type", "video", 'found "video", expected one of: multimodal, image, caption'),
        ("dataset_param.basic_parameters.data_path", "-", r"basic_parameters\[0\].data_path: missing"),
        ("dataset_param.basic_parameters", [], "is an empty list"),
        ("dataset_param.basic_parameters.repeat_time", 1.5, "found 1.5, expected a share"),
        ("dataset_param.basic_parameters.repeat_time", 0, "found 0.0, expected a share"),
        ("dataset_param.basic_parameters.return_type", "frame", "records are read one by one"),
        ("dataset_param.basic_parameters.data_storage_mode", "combine", "JSON and JSONL files are read"),
        ("dataset_param.preprocess_parameters.image_reader_type", "av", "found 'av', expected 'CLIPImageProcessor'"),
        ("dataset_param.preprocess_parameters.image_processer_type", "x", "no other processing exists"),
        ("dataset_param.preprocess_parameters.train_pipeline", "-", "give exactly one of"),
        ("dataset_param.preprocess_parameters.image_processer_path", "clip", "give exactly one of"),
        (
            "dataset_param.preprocess_parameters",
            {"fast_resize": True, "train_pipeline": {"resample": 1}},
            "fast_resize knows bicubic",
        ),
        ("dataset_param.preprocess_parameters.train_pipeline.crop", 3, 'crop: unknown key; did you mean "crop_size"'),
        ("dataset_param.preprocess_parameters.train_pipeline.pad2square", 1, "pad2square is 1; expected true or false"),
        ("dataset_param.preprocess_parameters.pad2square", True, "pad2square is given twice"),
        ("dataset_param.tokenizer_config.hub_backend", "openmind", "found 'openmind', expected 'hf'"),
        ("dataset_param.tokenizer_config.cache_dir", "/tmp", "nothing is downloaded"),
        ("dataset_param.tokenizer_config.padding_side", "left", "padded on the right"),
        ("dataset_param.tokenizer_config.trust_remote_code", True, "is never run"),
        ("dataset_param.tokenizer_config.from_pretrained", "-", "from_pretrained: missing"),
        ("dataset_param.use_text_processer", False, "text is always tokenised"),
        ("dataset_param.image_error", "ignore", "image_error: found"),
        ("dataloader_param.dataloader_mode", "variable", "depends on --seed alone"),
        ("dataloader_param.sampler_type", "Other", "there is one sampler"),
        ("dataloader_param.data_sharding", True, "must not depend on the number of ranks"),
        ("dataloader_param.batch_size", 8, "comes from --micro-batch-size on the command line"),
        ("dataloader_param.num_workers", 8, "comes from --num-workers on the command line"),
        ("dataloader_param.collate_param.model_name", "qwen", "there is one way to collate"),
        ("dataloader_param.shuffle", "yes", "shuffle: found \"yes\""),
    ],
)  # fmt: skip
def test_what_is_refused(path, value, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig.load(changed(path, value))


def test_all_problems_at_once():
    data = changed("dataset_param.use_text_processer", False)
    data["dataloader_param"]["batch_size"] = 3
    with pytest.raises(ConfigError, match=r"data config: 2 problems(.|\n)*dataloader_param.batch_size"):
        DataConfig.load(data)
