"""Tokenizers equal transformers 4's legacy Llama rule, whatever files the folder has."""

import json
import pickle
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.data.tokenizer_fast import FastTokenizer
from mindspeed_mm.data.tokenizer_sentencepiece import SentencePieceTokenizer
from mindspeed_mm.errors import DataError

FOLDERS = ["tokenizer", "models/vicuna", "models/vicuna_bin", "models/llava_original", "models/llava_hf"]


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "prompts/tokenizer_cases.json").read_text())


@pytest.fixture(scope="module")
def fast(golden, tmp_path_factory):
    """tokenizer.json alone."""
    folder = tmp_path_factory.mktemp("fast")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(golden / "tokenizer" / name, folder)
    return load_tokenizer(folder)


def copy_of(golden, tmp_path, name="tokenizer", **changes):
    """A writable copy of a golden tokenizer folder with changes to its tokenizer_config.json."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (golden / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_cases(golden, cases, folder):
    tokenizer = load_tokenizer(golden / folder)
    for case in cases:
        if "<image>" in case["text"] and folder == "models/llava_hf":
            continue  # a token of its own there
        ids = tokenizer.encode(case["text"])
        assert ids == case["input_ids"], case["text"]
        assert tokenizer.pieces(ids) == case["tokens"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == case["decoded"]
        if case["same_decode_in_transformers_5"]:
            assert tokenizer.decode(ids) == case["decoded_skip_special"]


def test_golden_cases_from_tokenizer_json_alone(cases, fast):
    assert isinstance(fast, FastTokenizer)
    for case in cases:
        assert fast.encode(case["text"]) == case["input_ids"], case["text"]
        if case["same_decode_in_transformers_5"]:
            assert fast.decode(case["input_ids"]) == case["decoded_skip_special"]


def test_a_tokenizer_json_rewritten_by_transformers_5_gets_its_rule_back(golden, cases, tmp_path):
    content = json.loads((golden / "tokenizer/tokenizer.json").read_text())
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == 0  # falls back to unk
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["input_ids"], case["text"]


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([*"ab .\n\u2581\u732b\U0001f600", "</s>", "<s>"]), max_size=12).map("".join))
def test_both_backends_agree_and_round_trip(tokenizer, fast, text):
    ids, starts = tokenizer.encode_with_starts(text)
    assert (ids, starts) == fast.encode_with_starts(text)
    assert starts == sorted(starts)
    if "<" not in text:
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_ids_and_sizes(golden):
    llava = load_tokenizer(golden / "models/llava_hf")
    assert (llava.bos_token_id, llava.eos_token_id, llava.unk_token_id, llava.pad_token_id) == (1, 2, 0, 1001)
    assert llava.vocab_size == 1002
    assert llava.encode("<image>a") == [1, 1000, 263]
    assert llava.token_to_id("<image>") == 1000
    assert llava.token_to_id("no such token") is None
    assert load_tokenizer(golden / "tokenizer").vocab_size == 1000


def test_special_text_can_be_kept_plain(tokenizer, fast):
    for backend in (tokenizer, fast):
        ids = backend.encode("a</s>", special_text=False)
        assert backend.eos_token_id not in ids
        assert backend.decode(ids) == "a</s>"


def test_legacy_false_is_honoured(golden, tmp_path):
    tokenizer = load_tokenizer(copy_of(golden, tmp_path, legacy=False))
    assert tokenizer.encode("a</s>b") == [1, 263, 2, 902]  # no space in front of the second chunk
    assert tokenizer.encode("</s> b") == [1, 2, 291]


def test_tokens_that_are_named_without_an_id(golden, tmp_path):
    folder = copy_of(golden, tmp_path, pad_token="[PAD]", additional_special_tokens=["<x>"])
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token_id, tokenizer.encode("<x>", add_bos=False)) == (1000, [1001])


def test_old_files_without_added_tokens_decoder(golden, tmp_path):
    bos = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True}
    folder = copy_of(golden, tmp_path, bos_token=bos, added_tokens_decoder=None, pad_token=None)
    (folder / "special_tokens_map.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a</s>b") == [1, 263, 2, 291]
    assert tokenizer.pad_token_id == 0


def test_stripping_added_tokens(golden, tmp_path):
    entry = {"content": "<x>", "lstrip": True, "rstrip": True, "special": True}
    tokenizer = load_tokenizer(copy_of(golden, tmp_path, added_tokens_decoder={"1000": entry}))
    assert tokenizer.encode_with_starts("a <x> b") == ([1, 263, 1000, 291], [-1, 0, 2, 6])


def test_save_and_pickle(golden, tmp_path):
    for name in ("models/llava_hf", "models/vicuna_bin"):
        tokenizer = load_tokenizer(golden / name)
        tokenizer.save(tmp_path / name)
        for other in (load_tokenizer(tmp_path / name), pickle.loads(pickle.dumps(tokenizer))):
            assert isinstance(other, SentencePieceTokenizer)
            assert other.encode("A cat.</s> <image>") == tokenizer.encode("A cat.</s> <image>")


def test_a_family_without_bos(tmp_path):
    """A byte-level BPE as Qwen's or GPT-2's."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "\u0120": 3}, [("a", "b")]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<|end|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab a<|end|>") == [2, 3, 0, 4]
    assert tokenizer.decode([2, 3, 0, 4]) == "ab a"
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (None, 4, 5)


def test_unknown_ids(tokenizer, fast):
    for backend in (tokenizer, fast):
        with pytest.raises(DataError, match="token id 1000 is not in the vocabulary; expected 0 to 999"):
            backend.decode([1, 1000])


def test_bad_folders(golden, tmp_path):
    with pytest.raises(DataError, match="no tokenizer folder at .*nothing is downloaded"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="holds config.json; expected tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match="tokenizer.json cannot be used"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x80\x04 not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": 3}, "eos_token is 3; expected a token's text"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "has the id 'x'; expected a non-negative integer"),
        ({"added_tokens_decoder": {"1000": {"content": "<x>", "single_word": True}}}, "single_word, not supported"),
        ({"added_tokens_decoder": {"1000": {"content": "<x>"}}}, "'<.im_start.>' in added_tokens.json and '<x>'"),
    ],
)
def test_bad_settings(golden, tmp_path, changes, message):
    name = "tokenizer_chatml" if "im_start" in message else "tokenizer"
    with pytest.raises(DataError, match=message):
        load_tokenizer(copy_of(golden, tmp_path, name, **changes))


def test_bad_settings_of_a_fast_tokenizer(golden, tmp_path):
    shutil.copy(golden / "tokenizer/tokenizer.json", tmp_path)
    with pytest.raises(DataError, match="names no eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|none|>"}')
    with pytest.raises(DataError, match="has no token '<|none|>'"):
        load_tokenizer(tmp_path)


def test_gap_between_added_tokens(golden, tmp_path):
    folder = copy_of(golden, tmp_path, added_tokens_decoder={"1005": {"content": "<x>", "special": True}})
    with pytest.raises(DataError, match="token id 1002 has no entry"):
        load_tokenizer(folder).decode([1002])


@pytest.mark.parametrize("fast_file", [False, True])
def test_added_tokens_of_a_user_are_tokens_and_control_tokens_stay_text(golden, tmp_path, fast_file):
    entries = {"1000": {"content": "<region>", "special": False}, "1001": {"content": "<|im_end|>", "special": False}}
    folder = copy_of(golden, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] |= entries
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if fast_file:
        content = json.loads((folder / "tokenizer.json").read_text())
        flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        content["added_tokens"] += [{"id": int(key)} | entry | flags for key, entry in entries.items()]
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (folder / "tokenizer.model").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.user_tokens == {"<region>": 1000} and {"</s>", "<|im_end|>"} <= tokenizer.control_tokens
    text = "What is in <region>? </s> <|im_end|>"
    plain = tokenizer.encode_with_starts(text, plain=[(0, len(text))])[0]
    assert plain.count(1000) == 1 and 1001 not in plain and tokenizer.eos_token_id not in plain
    assert tokenizer.encode(text, special_text=False) == plain
    whole = tokenizer.encode(text)
    assert {1000, 1001, tokenizer.eos_token_id} <= set(whole)
    place = plain.index(1000)
    assert tokenizer.pieces(plain[place - 1 : place + 3]) == ["\u2581", "<region>", "\u2581", "?"]


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"1002": {"content": "<x>", "rstrip": True}}}, "user"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|im_start|>", "<x>"]}, "control"),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<x>"}}, "control"),
        ("added_tokens.json", {"<x>": 1002}, "user"),
    ],
)
def test_letter_b_tokens_that_are_listed_beside_tokenizer_json_are_tokens(golden, tmp_path, file, content, kind):
    """As in transformers, which adds what tokenizer.json lacks."""
    from transformers import AutoTokenizer

    folder = copy_of(golden, tmp_path, "tokenizer_chatml")
    (folder / "tokenizer.model").unlink(missing_ok=True)
    before = json.loads((folder / file).read_text())
    if "added_tokens_decoder" in content:
        content = {"added_tokens_decoder": before["added_tokens_decoder"] | content["added_tokens_decoder"]}
    (folder / file).write_text(json.dumps(before | content))
    if file == "added_tokens.json":  # which counts where the newer list is not there
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["added_tokens_decoder"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.token_to_id("<x>") == theirs.convert_tokens_to_ids("<x>") == 1002
    assert ours.vocab_size == len(theirs) == 1003 and 1002 in ours.encode("Where <x> is")
    assert ("<x>" in ours.user_tokens, "<x>" in ours.control_tokens) == (kind == "user", kind == "control")
    assert 1002 in ours.encode("a <x>", special_text=False) or kind == "control"
    assert ours.encode("Where<x>is", add_bos=False) == theirs.encode("Where<x>is", add_special_tokens=False)


def test_letter_b_what_added_tokens_decoder_says_of_a_token_holds(golden, tmp_path):
    folder = copy_of(golden, tmp_path, "tokenizer_chatml")
    (folder / "tokenizer.model").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"]["1001"]["rstrip"] = True
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|im_end|> \n a") == tokenizer.encode("<|im_end|>a")
    config["added_tokens_decoder"]["1005"] = {"content": "<x>"}
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="'<x>' is listed with the id 1005 .* has the id 1002, or gets it"):
        load_tokenizer(folder)
