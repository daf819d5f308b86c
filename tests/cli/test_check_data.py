"""check-data finds everything that is wrong, says so in every form, and fixes wrong suffixes."""

import gzip
import json
import os
import re
import shutil
from collections import Counter

import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.data.expand import Encoding
from mindspeed_mm.data.image_source import ImageError
from mindspeed_mm.data.preflight import KINDS
from mindspeed_mm.data.preflight_report import fix_suffixes, histogram, write_whole
from mindspeed_mm.errors import DataError
from tests.helpers.golden_model import model_json


def record(number, image=None, answer="It is it."):
    text = "What is it?" if image is None else "<image>\nWhat is it?"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", "conversations": turns} | ({} if image is None else {"image": image})


@pytest.fixture
def check(tmp_path, golden, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("good.jpg", "wrong.gif", "rotated.jpg"):
        exif = Image.Exif()
        if name == "rotated.jpg":
            exif[0x0112] = 6
        Image.new("RGB", (20, 10), "red").save(folder / name, "JPEG", exif=exif)
    Image.new("RGB", (9, 9)).save(folder / "renamed.gif", "GIF")
    (folder / "empty.jpg").write_bytes(b"")

    def run(content, *flags, more=None, **dataset_param):
        path = tmp_path / "records.jsonl"
        path.write_text(content if isinstance(content, str) else "\n".join(json.dumps(item) for item in content))
        config = {
            "dataset_param": {
                "dataset_type": "multimodal",
                "basic_parameters": {"data_path": str(path), "data_folder": str(folder)},
                "preprocess_parameters": {"image_processer_path": str(golden / "models" / "clip_hf")},
                "tokenizer_config": {"from_pretrained": str(golden / "tokenizer")},
            }
            | dataset_param
        } | (more or {})
        (tmp_path / "data.json").write_text(json.dumps(config))
        report = tmp_path / "report.json"
        line = [
            "check-data",
            "--mm-data",
            str(tmp_path / "data.json"),
            "--tokens-per-image",
            "16",
            "--report",
            str(report),
        ]
        code = main([*line, *flags])
        output = capsys.readouterr()
        return code, json.loads(report.read_text()) if report.exists() else None, output

    return run


def test_a_clean_set(check, tmp_path):
    page = tmp_path / "page.html"
    records = [record(0), record(1, "good.jpg")]
    code, report, output = check(records, "--templates", "llava_llama_2", "--html", str(page), "--json")
    assert code == 0 and report["errors"] == 0 and report["records"] == 2 and report["images"] == 1
    (account,) = report["sets"]
    assert set(account["lengths"]) == {"v1", "llava_llama_2"} and account["text_only"] == 1
    assert account["image_width"]["p50"] == 20 and account["image_modes"] == {"JPEG RGB": 1}
    assert json.loads(output.out.splitlines()[-1])["errors"] == 0
    assert page.read_text().count("<svg") == 3 and "http" not in page.read_text()


def test_nothing_in_the_data_becomes_part_of_the_page(check, tmp_path):
    page = tmp_path / "page.html"
    records = [record("<script>alert(1)</script>", "<b>.jpg"), record("[red]", answer="</td>")]
    code, report, _ = check(records, "--html", str(page))
    assert code == 1 and report["sets"][0]["problems"] == {"missing image": 1}
    tags = re.findall(r"<[a-z!/][^>]*>", page.read_text())
    assert "&lt;b&gt;.jpg" in page.read_text() and not {"<b>", "<script>", "</script>"} & set(tags)
    opened, closed = (
        Counter(re.findall(pattern, page.read_text())) for pattern in (r"<(table|tr|td|th|svg|h\d)\b", r"</(\w+)>")
    )
    assert opened == {name: closed[name] for name in opened} and opened["svg"] == 2


def test_letter_c_everything_that_is_wrong_is_found(check):
    lines = [json.dumps(item) for item in [
        record(0, "good.jpg"), record(0, "good.jpg"), record(2, "gone.jpg"), record(3, "empty.jpg"),
        record(4, answer=""), record(5, answer="word " * 900), {"id": "x"}, record(7, "wrong.gif"),
        record(8, "rotated.jpg"),
        record(9, "../x.jpg"), [1],
    ]]  # fmt: skip
    lines.insert(3, '{"id": "broken", "conv')
    code, report, output = check("\n".join(lines), "--seq-length", "512")
    problems = report["sets"][0]["problems"]
    assert code == 1 and problems == {
        "record": 4,
        "missing image": 1,
        "broken image": 1,
        "too long": 1,
        "no supervision": 1,
        "empty answer": 1,
        "suffix": 1,
        "orientation": 1,
        "duplicate id": 1,
        "duplicate record": 1,
    }
    assert set(problems) | {
        "template",
        "file",
        "shared record",
        "unknown key",
        "unused key",
        "unknown id",
        "control token",
        "pair",
        "settings",
        "left out",
        "frames",
    } == set(KINDS)
    assert "problems and 4 warnings in 12 records" in output.err and "Traceback" not in output.err
    examples = report["sets"][0]["examples"]
    assert "(line 4, byte 18) cannot be parsed" in examples["record"][0]
    assert "record 0 (id r0): again in record 1. Expected" in examples["duplicate id"][0]
    assert 'the answer in turn 1 is empty; expected a text, such as {"from": "gpt"' in examples["empty answer"][0]
    assert "The longest text is that of turn 1, 4500 characters" in examples["too long"][0]
    assert "error: missing image" in output.out


def test_letter_c_what_data_json_leaves_out_is_no_error(check):
    records = [record(0, "good.jpg"), record(1, answer=""), record(2, answer="word " * 900), record(3, "gone.jpg")]
    more = [record(number, answer=f"Number {number}.") for number in range(4, 30)]
    policies = {"overlong": "drop", "empty_answer": "drop", "image_error": "skip"}
    code, report, _ = check(records + more, "--seq-length", "512", **policies)
    assert code == 0 and report["sets"][0]["problems"] == {"left out": 3}
    assert 'tokens, the maximum is 512; "overlong": "drop" leaves' in report["sets"][0]["examples"]["left out"][1]
    code, report, _ = check(records, "--seq-length", "512", **policies, max_skip_percent=0)
    (said,) = report["sets"][0]["examples"]["settings"]
    assert code == 1 and "1 of 4 records of all sets have no usable image" in said
    code, report, _ = check([record(1, answer="")], **policies)
    (said,) = report["sets"][0]["examples"]["settings"]
    assert code == 1 and "all of its 1 records are left out" in said


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(("policy", "found"), [("error", "broken image"), ("skip", "left out")])
def test_letter_c_images_of_a_size_that_the_model_does_not_take(check, monkeypatch, policy, found):
    """Case: images that open, but of sides that no grid of patches fits, passed."""

    def of(_encoding, sample):
        raise ImageError("sides of a ratio of at most 200")

    monkeypatch.setattr(Encoding, "of", of)
    _, report, _ = check([record(0, "good.jpg"), record(1, "empty.jpg")], image_error=policy)
    assert report["sets"][0]["problems"][found] == 2
    assert "a ratio of at most 200" in report["sets"][0]["examples"][found][0]


def test_letter_c_pairs_that_cannot_be_compared_stop_nothing(check):
    """Case: a long pair that the template cannot compare ended the command where long ones are dropped."""
    pair = {"prompt": "<image>\nWhat?", "chosen": "b " * 900, "rejected": "c " * 900, "image": "good.jpg"}
    options = {"dataset_type": "preference", "overlong": "drop", "template_name": "plain"}
    code, report, _ = check([pair, pair], "--seq-length", "512", **options)
    assert code == 1 and report["records"] == 2 and report["sets"][0]["problems"]["pair"] == 2


def test_letter_c_a_missing_first_set_says_nothing_of_the_others(check, tmp_path):
    sets = [{"data_path": str(tmp_path / name)} for name in ("gone.jsonl", "records.jsonl")]
    _, report, _ = check([PAIR], basic_parameters=sets, dataset_type="preference")
    assert [account["problems"] for account in report["sets"]] == [{"file": 1}, {}]
    asked = {"data_path": str(tmp_path / "records.jsonl"), "dataset_type": "preference"}
    _, report, _ = check([PAIR], dataset_type="preference", more={"prediction": {"test": asked}})
    assert "which have no one answer; give conversations" in report["sets"][1]["examples"]["settings"][0]


@pytest.mark.parametrize(
    ("records", "param", "more", "said"),
    [
        ([record(0)], {}, {"objective": "dpo"}, "the objective trains on preference records"),
        ([record(0)], {}, {"objective": "dpoo"}, 'did you mean "dpo"'),
        ([PAIR], {"dataset_type": "preference"}, {"objective": "sft"}, "which this objective does not train on"),
        ([record(0)], {}, {"dataloader_param": {"packing": True, "packing_length": 9}}, "length is 9, less than"),
        ([record(0)], {"beside": 1}, {"objective": "sft"}, "this objective does not read"),
    ],
)
def test_letter_c_settings_that_train_refuses(check, tmp_path, records, param, more, said):
    if param.pop("beside", None):
        (tmp_path / "beside.json").write_text(json.dumps([record(0)]))
        param["auxiliary_parameters"] = {"data_path": str(tmp_path / "beside.json"), "dataset_type": "multimodal"}
    code, report, output = check(records, more=more, **param)
    assert code == 1 and said in (json.dumps(report, ensure_ascii=False) + output.err).replace('\\"', '"')


def test_letter_c_a_share_of_nothing_and_pairs_among_conversations(check, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(PAIR | {"rejected": text}) for text in "cd"))
    sets = [{"data_path": str(tmp_path / "records.jsonl"), "repeat_time": 0.1}]
    sets.append({"data_path": str(tmp_path / "pairs.jsonl"), "dataset_type": "preference"})
    code, report, _ = check([record(0)], basic_parameters=sets)
    assert code == 1 and [account["problems"] for account in report["sets"]] == [{"settings": 1}, {"settings": 1}]
    assert "a share of 0.1 of 1 records is none" in report["sets"][0]["examples"]["settings"][0]


def test_letter_c_sets_of_prediction_are_looked_at(check, tmp_path):
    lines = [record(0, "gone.jpg"), record(1, answer=""), record(2, answer="word " * 900)]
    lines.append(record(3) | {"conversations": record(3)["conversations"][:1]})
    (tmp_path / "asked.json").write_text(json.dumps(lines))
    asked = {"data_path": str(tmp_path / "asked.json"), "data_folder": str(tmp_path / "images")}
    code, report, _ = check([record(9)], "--seq-length", "512", more={"prediction": {"test": asked}})
    assert code == 1 and report["sets"][1]["problems"] == {"record": 1, "missing image": 1}
    asked["metric"] = "exact"
    code, report, _ = check([record(9)], "--seq-length", "512", more={"prediction": {"test": asked}})
    assert report["sets"][1]["problems"] == {"record": 1, "missing image": 1, "empty answer": 1}


def test_letter_c_odd_files(check, tmp_path):
    folder, frame = tmp_path / "images", Image.new("RGB", (8, 8))
    frame.save(folder / "camera.jpg", "MPO", save_all=True, append_images=[frame])
    frame.save(folder / "moving.png", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    os.mkfifo(folder / "pipe.png")
    names = ("camera.jpg", "moving.png", "pipe.png")
    code, report, _ = check([record(number, name, answer=name) for number, name in enumerate(names)])
    assert code == 1 and report["sets"][0]["problems"] == {"broken image": 1, "frames": 1}
    assert report["sets"][0]["image_modes"] == {"MPO RGB": 1, "PNG RGB": 1}
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b"{}"))
    for name, said in (("pipe.json", "it is a folder, a pipe or a device"), ("a.jsonl", "is compressed (gzip)")):
        code, report, _ = check("", basic_parameters={"data_path": str(tmp_path / name)})
        assert code == 1 and said in report["sets"][0]["examples"]["file"][0]


def test_keys_that_nothing_reads(check):
    keys = [{"Image": "good.jpg"}, {"video": "a.mp4"}, {"mood": "x"}, {}]
    records = [record(number, answer=f"It is {number}.") | more for number, more in enumerate(keys)]
    code, report, _ = check(records)
    assert code == 1 and report["sets"][0]["problems"] == {"unknown key": 2, "unused key": 1}
    examples = report["sets"][0]["examples"]
    assert "record 0 (id r0), line 1: 'Image' is no key of a record" in examples["unknown key"][0]
    assert "record 1 (id r1), line 2: 'video' is not read here" in examples["unknown key"][1]
    assert "record 2 (id r2): mood" in examples["unused key"][0]
    code, report, _ = check(records, unknown_keys="warn")
    assert code == 0 and report["sets"][0]["problems"] == {"unused key": 3}


def test_letter_c_added_tokens_are_tokens_and_need_rows(check, golden, tmp_path):
    folder = shutil.copytree(golden / "tokenizer", tmp_path / "tok")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] |= {"1000": {"content": "<region>", "special": False}}
    settings["added_tokens_decoder"] |= {"1001": {"content": "<|end|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "model.json").write_text(json.dumps(model_json(golden)))
    records = [record(0, answer="a <region>"), record(1, answer="b <|end|>"), record(2, answer="c")]
    flags = ("--mm-model", str(tmp_path / "model.json"))
    code, report, _ = check(records, *flags, tokenizer_config={"from_pretrained": str(folder)})
    assert code == 1 and report["sets"][0]["problems"] == {"settings": 1, "unknown id": 1, "control token": 1}
    examples = report["sets"][0]["examples"]
    assert "record 0 (id r0): '<region>' is id 1000, the embedding has 1000 rows" in examples["unknown id"][0]
    assert "record 1 (id r1): '<|end|>' is split" in examples["control token"][0]


def test_an_image_processor_without_one_size_is_refused_as_in_training(check):
    pipeline = {"size": {"shortest_edge": 28}, "do_center_crop": False}
    code, _, output = check([record(0)], preprocess_parameters={"train_pipeline": pipeline})
    assert code == 1 and "gives images of different sizes" in output.err


def test_templates_that_do_not_fit(check):
    code, report, _ = check([record(0)], template_name="plain")
    assert code == 1 and report["sets"][0]["problems"] == {"template": 1}
    code, report, _ = check([record(0, answer="word " * 900)], "--seq-length", "200", overlong="truncate")
    assert code == 0 and report["sets"][0]["lengths"]["v1"]["p100"] > 200


def test_the_number_of_processes_changes_nothing(check):
    records = [record(i, "good.jpg" if i % 3 else None) for i in range(300)]
    alone, together = (check(records, "--workers", workers, "--no-images") for workers in ("1", "2"))
    assert (alone[0], alone[1]["records"], alone[1]["images"]) == (0, 300, 200)
    assert alone[1] | {"seconds": 0} == together[1] | {"seconds": 0}


def test_suffixes_are_fixed(check, tmp_path):
    records = [record(0, "wrong.gif", answer="wrong.gif"), record(1, "renamed.jpg"), record(2, "good.jpg")]
    code, report, _ = check(records, "--fix-suffix")
    assert code == 1  # renamed.jpg is missing in the file as it is
    fixed = tmp_path / "records.fixed.jsonl"
    assert report["fixed"] == [str(fixed)]
    rows = [json.loads(line) for line in fixed.read_text().splitlines()]
    assert [row["image"] for row in rows] == ["wrong.jpg", "renamed.gif", "good.jpg"]
    assert rows[0]["conversations"] == records[0]["conversations"]  # an answer that reads like the name
    code, report, _ = check(fixed.read_text())
    assert code == 0 and not report["sets"][0]["problems"]
    assert (tmp_path / "images" / "wrong.gif").exists()


def test_a_name_that_is_taken_is_not_taken_again(check, tmp_path):
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "images" / "wrong.jpg")
    check([record(0, "wrong.gif"), record(1, "wrong.jpg")], "--fix-suffix")
    names = [json.loads(line)["image"] for line in (tmp_path / "records.fixed.jsonl").read_text().splitlines()]
    assert names == ["wrong.gif.jpg", "wrong.jpg"]
    assert Image.open(tmp_path / "images" / "wrong.gif.jpg").getpixel((5, 5))[0] > 200


def test_what_cannot_be_fixed(check, tmp_path):
    code, _, output = check([record(0, "wrong.gif"), "x"], "--fix-suffix")
    assert code == 1 and "record 1 is 'x'; expected an object" in output.err
    with pytest.raises(DataError, match="rewrites JSON and JSONL, not"):
        fix_suffixes(tmp_path / "a.parquet", "", {})


def test_files_that_cannot_be_read_are_reported(check, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(record(0)))
    sets = [{"data_path": str(tmp_path / "none.json")}, {"data_path": str(other)}]
    code, report, _ = check("", basic_parameters=sets)
    assert code == 1 and [account["problems"] for account in report["sets"]] == [{"file": 1}, {}]
    code, report, _ = check("[" + json.dumps(record(0)) + ", {")
    assert code == 1 and report["sets"][0]["problems"] == {"file": 1} and report["records"] == 1


def test_warnings_may_fail_the_check(check, tmp_path):
    records = [record(0), record(0, answer="Another.")]
    code, report, _ = check(records)
    assert code == 0 and report["sets"][0]["problems"] == {"duplicate id": 1}
    code, _, output = check(records, "--strict")
    assert code == 1 and "0 problems and 1 warnings in 2 records" in output.err


def test_records_that_two_sets_share(check, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(record(7, answer="New.")) + "\n" + json.dumps(record(1)))
    code, report, _ = check([record(0)], validation_parameters={"data_path": str(held_out)})
    (_, second) = report["sets"]
    assert code == 0 and second["problems"] == {"shared record": 1}
    assert "record 1 (id r1): an earlier set" in second["examples"]["shared record"][0]


def test_names_that_no_file_can_have(check):
    code, report, _ = check([record(0, "a" * 5000 + ".jpg"), record(1, "\ud800.jpg"), record("\ud800")])
    assert code == 1 and report["sets"][0]["problems"] == {"record": 2, "missing image": 1}


def test_a_list_stays_a_list(check, tmp_path):
    check(json.dumps([record(0, "wrong.gif"), record(1)]), "--fix-suffix")
    assert [item["id"] for item in json.loads((tmp_path / "records.fixed.jsonl").read_text())] == ["r0", "r1"]


def test_preference_records_are_checked(check):
    code, report, _ = check([{"prompt": "a", "chosen": "b", "rejected": "c"}], dataset_type="preference")
    assert code == 0 and report["records"] == 1
    assert set(report["sets"][0]["lengths"]) == {"v1", "v1, rejected"}
    code, report, _ = check([{"prompt": "a", "chosen": "b", "rejected": "c " * 900}], dataset_type="preference")
    assert code == 0  # 2,048 by default
    code, report, _ = check(
        [{"prompt": "a", "chosen": "b", "rejected": "c " * 900}], "--seq-length", "300", dataset_type="preference"
    )
    assert code == 1 and report["sets"][0]["problems"] == {"too long": 1}
    pair = {"prompt": "<image>\na", "chosen": "b", "rejected": "c", "images": ["good.jpg"]}
    code, report, _ = check([pair], dataset_type="preference", template_name="plain")
    assert code == 1 and report["sets"][0]["problems"] == {"pair": 1}
    pairs = [{"prompt": "a", "chosen": "b", "rejected": text} for text in "cd"]
    assert check(pairs, dataset_type="preference")[1]["sets"][0]["problems"] == {}


def test_ha_dpo_files_are_checked(check, tmp_path):
    rows = {str(number): {"chosen": ["A dog."], "rejected": ["A cat."]} for number in (1, 2, 3)}
    files = [{"image_id": 1, "url": "x/images/good.jpg"}, {"image_id": 2, "url": "x/images/gone.jpg"}]
    (tmp_path / "image_data.json").write_text(json.dumps(files))
    sets = {"data_path": str(tmp_path / "records.jsonl"), "data_folder": str(tmp_path)}
    code, report, _ = check(json.dumps(rows), dataset_type="ha_dpo", basic_parameters=sets)
    assert code == 1 and report["sets"][0]["problems"] == {"missing image": 1, "record": 1}
    assert "image_id 3 is not in" in report["sets"][0]["examples"]["record"][0]


def test_what_cannot_be_checked(check, tmp_path, golden, capsys):
    code, _, output = check([record(0)], "--report", str(tmp_path / "no" / "folder.json"))
    assert code == 1 and "cannot write" in output.err
    code, _, output = check([record(0)], tokenizer_config=None)
    assert code == 1 and "no tokenizer: give --tokenizer" in output.err


def test_histograms_of_nothing():
    assert histogram([], 5) == "<p>none</p>"


def test_names_of_any_bytes_can_be_written(tmp_path):
    """Python holds bytes of a file name that are not UTF-8 as halves of surrogate pairs."""
    write_whole(tmp_path / "page.html", "\udcff.tar")
    assert (tmp_path / "page.html").read_text() == "\\udcff.tar"
