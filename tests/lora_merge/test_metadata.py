"""What files say about themselves: hashes that are true, dates that are theirs, and the words and names of their inputs."""

import datetime
import hashlib
import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcm_kit.lora_merge import Lora, MergeOptions, load, merge, merge_with_account, resize, save
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.files.new_metadata import _set_implementation, for_file
from lcm_kit.lora_merge.merging.budget import numbers_within
from lcm_kit.lora_merge.merging.report import warnings_of
from lcm_kit.lora_merge.metadata import tags
from lcm_kit.lora_merge.metadata.about import trigger_words
from lcm_kit.lora_merge.metadata.fields import ADAPTER_KEY, is_name
from lcm_kit.lora_merge.metadata.inherit import size_of
from lcm_kit.lora_merge.metadata.report import describe_metadata, shown
from lcm_kit.lora_merge.recognise.identity import identify
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, kohya, metadata

MODULE = "lora_unet_mid_block_attentions_0_proj_in"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def kohyas_hashes(path):
    """As kohya's trainers and A1111 define them, of the file written anew by safetensors with the training's notes alone."""
    stripped = {key: value for key, value in metadata(path).items() if key.startswith("ss_")}
    whole = safetensors.torch.save(load_file(path), stripped)
    data = whole[8 + int.from_bytes(whole[:8], "little") :]
    legacy = hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(data).hexdigest(), "sshs_legacy_hash": legacy}


def assert_hashes_are_true(path):
    whole, said = path.read_bytes(), metadata(path)
    data = hashlib.sha256(whole[8 + int.from_bytes(whole[:8], "little") :]).hexdigest()
    expected = kohyas_hashes(path) | {"modelspec.hash_sha256": f"0x{data}"}
    assert expected["sshs_model_hash"] == data
    assert {key: said[key] for key in HASHES} == expected


def stale(**more):
    return {
        "sshs_model_hash": "1" * 64,
        "sshs_legacy_hash": "1" * 8,
        "modelspec.hash_sha256": "0x" + "1" * 64,
        "modelspec.hash_md5": "0x1",
        "modelspec.date": "2020-01-01",
        "ss_training_started_at": "1600000000.0",
        "ss_network_dim": "99",
    } | more


@pytest.fixture
def files(tmp_path):
    """Two LoRAs of more than a MB, where the legacy hash begins, and two models."""
    for name, seed in (("style", 1), ("lcm", 2)):
        state = kohya(MODULE, *factors(640, 512, 640, seed=seed), alpha=2)
        save_file({key: value.half() for key, value in state.items()}, tmp_path / f"{name}.safetensors", stale())
    for name, seed in (("tuned", 1), ("base", 2)):
        weight = torch.randn(640, 640, generator=torch.Generator().manual_seed(seed))
        save_file({"diffusion_model.middle_block.1.proj_in.weight": weight}, tmp_path / f"{name}.safetensors")
    return tmp_path


VERBS = {
    "merge": ["merge", "style", "lcm", "--rank", "500"],
    "merge of one": ["merge", "style:0.7"],
    "resize": ["resize", "style", "--rank", "450"],
    "extract": ["extract", "tuned", "base", "--rank", "480"],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_command_writes_states_its_true_hashes(files, verb, dtype):
    name, *rest = VERBS[verb]
    arguments = [f"{files}/{one.replace(':', '.safetensors:') if ':' in one else one + '.safetensors'}"
                 if one.partition(":")[0] in ("style", "lcm", "tuned", "base") else one for one in rest]  # fmt: skip
    out = files / "out.safetensors"
    assert main([name, *arguments, "-o", str(out), "--dtype", dtype]) == 0
    assert_hashes_are_true(out)
    said = metadata(out)
    assert said["sshs_legacy_hash"] != hashlib.sha256(b"").hexdigest()[:8]
    assert said["modelspec.date"] == datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    assert "modelspec.hash_md5" not in said
    assert any(key.startswith("lcm_kit.") for key in said)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_file_loaded_and_saved_states_its_true_hashes(files, format, dtype):
    save(load(files / "style.safetensors"), files / "out.safetensors", dtype=dtype, format=format)
    assert_hashes_are_true(files / "out.safetensors")
    said = metadata(files / "out.safetensors")
    assert said["ss_training_started_at"] == "1600000000.0"  # how it was trained is still true
    assert said["ss_network_dim"] == "512"
    assert any(key.startswith("lcm_kit.") for key in said)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", [*kinds.ADDITIVE, *kinds.CARRIED])
def test_every_kind_of_file_states_its_true_hashes(tmp_path, kind, dtype):
    """Also where numbers of several kinds stand in one file, whose order safetensors has its own rules for."""
    needs_kernel = kind in kinds.ADDITIVE and kinds.ADDITIVE[kind][1]
    state = kinds.state_dict(kind, MODULE, kernel=(3, 3) if needs_kernel else (), alpha=2)
    save(Lora.from_state_dict(state, metadata=stale()), tmp_path / "out.safetensors", dtype=dtype)
    assert_hashes_are_true(tmp_path / "out.safetensors")


def test_hashes_are_true_where_the_header_reaches_into_the_legacy_hash(tmp_path):
    state = kohya(MODULE, *factors(640, 512, 640, seed=1), alpha=2)
    lora = Lora.from_state_dict(state, metadata={"ss_tag_frequency": json.dumps({"x": {"y" * 700_000: 1}})})
    save(lora, tmp_path / "out.safetensors")
    assert_hashes_are_true(tmp_path / "out.safetensors")


# ---- what a merge keeps


def small(seed=1, source="a.safetensors", **notes):
    state = kohya(MODULE, *factors(8, 2, 6, seed=seed), alpha=1)
    return Lora.from_state_dict(
        state, metadata={key.replace("__", "."): value for key, value in notes.items()}, source=source
    )


def pair(first, second):
    return [(small(1, "a.safetensors", **first), 0.8), (small(2, "b.safetensors", **second), 1.0)]


def test_tags_are_summed_by_folder_and_tag():
    one = {"10_cat": {"cat": 3, "grass": 1}, "5_x": {"é": 2}}
    other = {"10_cat": {"cat": 4, "tree": 1}, "1_dog": {"dog": 9}}
    merged = merge(pair({"ss_tag_frequency": json.dumps(one)}, {"ss_tag_frequency": json.dumps(other)}))
    assert json.loads(merged.metadata["ss_tag_frequency"]) == {
        "10_cat": {"cat": 7, "grass": 1, "tree": 1},
        "5_x": {"é": 2},
        "1_dog": {"dog": 9},
    }


@pytest.mark.parametrize("key", ["modelspec.trigger_phrase", "trained_words", "ss_trigger_words", "modelspec.tags"])
def test_words_of_all_inputs_are_kept_once(key):
    one, other = {key.replace(".", "__"): "inkstyle, a cat"}, {key.replace(".", "__"): "a cat,fast"}
    assert merge(pair(one, other)).metadata[key] == "inkstyle, a cat, fast"
    lists = pair({key.replace(".", "__"): '["one, two"]'}, {key.replace(".", "__"): '["three", "one, two"]'})
    assert json.loads(merge(lists).metadata[key]) == ["one, two", "three"]


def test_a_text_may_be_as_long_as_is_said_and_is_left_out_with_its_length_beyond():
    for length in (100_000, 100_001):
        merged, account = merge_with_account(pair({"description": "x" * length}, {"trigger_words": "y" * length}))
        kept = length == 100_000
        assert ("description" in merged.metadata, "trigger_words" in merged.metadata) == (kept, kept)
        told = [one for one in warnings_of(account) if f"because it has {length} characters" in one]
        assert len(told) == (0 if kept else 2)
        assert trigger_words({"trigger_words": "y" * length}) == (["y" * length] if kept else [])


@pytest.mark.parametrize(
    ("number", "sane"),
    [(1e15, False), (-1e15, False), (1e15 - 1, True), (0.5, True), (True, False), ("3", False), (None, False)],
)
def test_a_tag_has_a_number_that_can_be_added_up(number, sane):
    text = {tags.KEY: json.dumps({"x": {"cat": number}})}
    if sane:
        assert tags.read(text) == {"x": {"cat": number}}
    else:
        with pytest.raises(ValueError, match="'cat' has no sane number"):
            tags.read(text)


def test_tags_that_just_fit_are_all_kept_and_of_more_the_most_frequent_half(monkeypatch):
    """A header writes the JSON as a text, with its quotes escaped, and every letter as it is."""
    found = {"a": {f"é{n}": n for n in range(7)}, "b": {f"{n}": 10 + n for n in range(3)}}
    text = json.dumps(found, ensure_ascii=False)
    length = len(text.encode()) + text.count('"') + 2
    monkeypatch.setattr(tags, "MAX_BYTES", length)
    assert tags.to_text(found) == (text, 10)
    monkeypatch.setattr(tags, "MAX_BYTES", length - 1)
    kept = {"a": {"é5": 5, "é6": 6}, "b": {"0": 10, "1": 11, "2": 12}}
    assert tags.to_text(found) == (json.dumps(kept, ensure_ascii=False), 5)
    for limit, told in ((length, []), (length - 1, ["of 10 tags in ss_tag_frequency the 5 most frequent are kept"])):
        monkeypatch.setattr(tags, "MAX_BYTES", limit)
        _, account = merge_with_account(
            pair({tags.KEY: json.dumps({"a": found["a"]})}, {tags.KEY: json.dumps({"b": found["b"]})})
        )
        assert [one.split(",")[0] for one in warnings_of(account)] == told


def test_of_tags_that_are_as_frequent_the_first_are_kept(monkeypatch):
    found = {"b": {f"t{n}": 5 for n in (3, 1, 2)}, "a": {"z": 5, "y": 9, "x": 1}}
    monkeypatch.setattr(tags, "MAX_BYTES", 60)
    assert tags.to_text(found) == ('{"b": {"t3": 5, "t1": 5}, "a": {"y": 9}}', 3)
    assert tags.top({"b": {"t3": 5, "t1": 5}, "a": {"t0": 5, "y": 9}}, 3) == ["y", "t3", "t1"]


def test_the_size_of_metadata_is_what_it_takes_in_a_header():
    notes = {"é": 'x"y', "a": "line\n", "b\\": "日本"}
    assert size_of(notes) == len(json.dumps(notes, ensure_ascii=False, separators=(",", ":")).encode()) - 1
    assert size_of({}) == 0


def test_words_in_lists_are_written_letter_by_letter():
    assert (
        merge(pair({"trained_words": '["é"]'}, {"trained_words": '["日"]'})).metadata["trained_words"] == '["é", "日"]'
    )
    mixed = merge(pair({"trained_words": '["é"]'}, {"trained_words": "b"})).metadata["trained_words"]
    assert mixed == "é, b"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 197 + "..."),
        (" a\n b\tc ", "a b c"),
        ("a\x1bb", "a?b"),
        (" " * 1999 + "x", "x"),
        (" " * 2000 + "x", ""),
    ],
)
def test_anybodys_text_is_shown_in_one_short_line(text, told):
    assert shown(text) == told


@pytest.mark.parametrize(
    ("key", "good"),
    [("a", True), ("a" * 200, True), ("a" * 201, False), ("", False), (" a", False), ("a ", False), ("a\n", False)],
)
def test_a_name_of_metadata_is_short_and_printable(key, good):
    assert is_name(key) is good


def test_the_configuration_in_a_file_is_in_the_order_of_its_names():
    notes = for_file(Lora.from_state_dict(kinds.state_dict("LoRA", MODULE)), "x", "diffusers")[ADAPTER_KEY]
    assert notes == json.dumps(json.loads(notes), sort_keys=True)


def test_the_modelspec_is_claimed_of_those_two_fields_alone():
    one = Lora({}, metadata={"modelspec.architecture": "x", "modelspec.implementation": "y"})
    assert for_file(one, "x", "kohya")["modelspec.sai_model_spec"] == "1.0.0"
    bare = {"modelspec.architecture": "x", "modelspec.implementation": "y"}
    _set_implementation(bare, "kohya")
    assert bare["modelspec.sai_model_spec"] == "1.0.0"


def test_authors_licences_and_hints_name_everybody():
    merged, account = merge_with_account(
        pair(
            {"modelspec__author": "Ann", "modelspec__license": "MIT", "modelspec__usage_hint": "0.8 is enough"},
            {"modelspec__author": "Bob", "modelspec__license": "CC-BY-NC-4.0", "modelspec__usage_hint": "4 steps"},
        )
    )
    assert merged.metadata["modelspec.author"] == "Ann, Bob"
    assert merged.metadata["modelspec.license"] == "MIT (a.safetensors); CC-BY-NC-4.0 (b.safetensors)"
    assert merged.metadata["modelspec.usage_hint"] == "a.safetensors: 0.8 is enough\nb.safetensors: 4 steps"
    assert any(
        "different licences, MIT (a.safetensors); CC-BY-NC-4.0 (b.safetensors)" in one for one in warnings_of(account)
    )
    same = merge(pair({"modelspec__author": "Ann", "license": "MIT"}, {"modelspec__author": "Ann", "license": "MIT"}))
    assert (same.metadata["modelspec.author"], same.metadata["license"]) == ("Ann", "MIT")


def test_what_the_inputs_say_of_the_base_is_kept_where_they_agree():
    base = {"ss_base_model_version": "sd_v1", "ss_sd_model_name": "x.ckpt", "modelspec__resolution": "512x512"}
    merged = merge(pair(base | {"ss_clip_skip": "2"}, base | {"modelspec__resolution": "768x768", "ss_epoch": "3"}))
    assert merged.metadata["ss_base_model_version"] == "sd_v1"
    assert merged.metadata["ss_sd_model_name"] == "x.ckpt"
    assert merged.metadata["ss_clip_skip"] == "2"
    assert not {"modelspec.resolution", "ss_epoch"} & merged.metadata.keys()


def test_an_input_of_which_any_module_is_in_the_sum_has_a_part():
    one = small(1, "a.safetensors", modelspec__author="Ann")
    text = kohya("lora_te_text_model_encoder_layers_0_mlp_fc1", *factors(8, 2, 6), 1.0)
    state = {key: tensor for lora in (small(2),) for key, tensor in lora.to_state_dict().items()} | text
    other = Lora.from_state_dict(state, metadata={"modelspec.author": "Bob"}, source="b.safetensors")
    for blocks, author in (("te=0", "Ann, Bob"), ("unet=0", "Ann, Bob"), ("te=0, unet=0", "Ann")):
        merged = merge([(one, 1.0), (other, 1.0)], block_strengths=["", blocks])
        assert merged.metadata["modelspec.author"] == author


def test_an_input_without_a_part_in_the_sum_is_not_named():
    words = {"modelspec__author": "Bob", "modelspec__trigger_phrase": "fast", "ss_tag_frequency": '{"x":{"y":1}}'}
    (a, _), (b, _) = pair({"modelspec__author": "Ann", "ss_epoch": "3"}, words)
    alone = merge([(a, 1.0), (b, 0.0)])
    by_blocks = merge([(a, 1.0), (b, 1.0)], block_strengths=["", "unet=0"])
    for merged in (alone, by_blocks):
        assert merged.metadata["modelspec.author"] == "Ann"
        assert merged.metadata["ss_epoch"] == "3"  # it alone keeps all
        assert merged.metadata["modelspec.merged_from"] == "a.safetensors"
        assert not {"modelspec.trigger_phrase", "ss_tag_frequency"} & merged.metadata.keys()


PICTURE = {
    "modelspec__thumbnail": "data:image/jpeg;base64,AAAA",
    "ssmd_cover_images": '["AAAA"]',
    "x": "DATA:image/png,",
}


def test_one_input_keeps_all_but_pictures_scales_and_hashes(tmp_path):
    notes = stale() | {"anything": "else", "modelspec__title": "Ink", "lora_alpha": "2", "modelspec__author": "Ann"}
    merged = merge([(small(**notes, **PICTURE), 0.7)])
    save(merged, tmp_path / "x.safetensors")
    said = metadata(tmp_path / "x.safetensors")
    assert said["anything"] == "else"
    assert (said["modelspec.title"], said["modelspec.author"]) == ("Ink", "Ann")
    assert said["ss_training_started_at"] == "1600000000.0"
    assert not {"lora_alpha", "modelspec.hash_md5", "modelspec.thumbnail", "ssmd_cover_images", "x"} & said.keys()
    assert_hashes_are_true(tmp_path / "x.safetensors")


def test_no_picture_comes_into_a_merge_and_a_smaller_lora_keeps_its_own():
    assert not {"modelspec.thumbnail", "ssmd_cover_images", "x"} & merge(pair(PICTURE, PICTURE)).metadata.keys()
    smaller = resize(small(**PICTURE, modelspec__merged_from="a, b"), rank=1)
    assert smaller.metadata.keys() >= {"modelspec.thumbnail", "ssmd_cover_images", "x"}
    assert smaller.metadata["modelspec.merged_from"] == "a, b"
    assert "modelspec.merged_from" not in resize(small(), rank=1).metadata
    odd = {"lcm_kit.merge": "data:image/png,", "r": "data:image/png,", "x\0": "data:image/png,"}
    assert not {"r", "x\0"} & resize(small(**odd), rank=1).metadata.keys()


def test_the_modelspec_is_claimed_where_its_fields_are_there(tmp_path):
    save(merge(pair({}, {})), tmp_path / "unknown.safetensors")
    assert "modelspec.sai_model_spec" not in metadata(tmp_path / "unknown.safetensors")
    one = {"modelspec__architecture": "stable-diffusion-xl-v1-base/lora"}
    save(merge(pair(one, {})), tmp_path / "known.safetensors")
    said = metadata(tmp_path / "known.safetensors")
    assert said["modelspec.sai_model_spec"] == "1.0.0"
    assert said["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert {"modelspec.architecture", "modelspec.title", "modelspec.date"} <= said.keys()


def test_modules_tell_the_architecture_where_no_input_does():
    blocks = {}
    for level, width in ((1, 320), (2, 640)):
        name = f"lora_unet_down_blocks_{level - 1}_attentions_0_transformer_blocks_0_attn2_to_k"
        blocks |= kohya(name, *factors(width, 2, 768))
    lora = Lora.from_state_dict(blocks)
    assert merge([(lora, 1.0)]).metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    # What an input says, or somebody who wants another one or none, holds.
    said = Lora.from_state_dict(blocks, metadata={"modelspec.architecture": "mine"})
    assert merge([(said, 1.0)]).metadata["modelspec.architecture"] == "mine"
    for one in (lora, said):
        given = merge([(one, 1.0)], metadata={"modelspec.architecture": "other"})
        assert given.metadata["modelspec.architecture"] == "other"
        assert "modelspec.architecture" not in merge([(one, 1.0)], metadata={"modelspec.architecture": ""}).metadata
    noted = pair({"ss_base_model_version": "sdxl_base_v1-0"}, {})
    assert merge(noted).metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (
        "modelspec.architecture"
        not in merge(pair({"ss_base_model_version": "sd_v1"}, {"ss_base_model_version": "x"})).metadata
    )


# ---- huge and hostile


def test_tags_beyond_what_a_header_holds_are_cut_to_the_most_frequent(tmp_path, monkeypatch):
    monkeypatch.setattr(tags, "MAX_BYTES", 10_000)
    many = [{f"tag {side} {n}": n for n in range(500)} for side in "ab"]
    merged, account = merge_with_account(pair(*({"ss_tag_frequency": json.dumps({"1_x": one})} for one in many)))
    kept = json.loads(merged.metadata["ss_tag_frequency"])["1_x"]
    assert len(merged.metadata["ss_tag_frequency"]) < 10_000
    assert len(kept) == 250
    assert sorted(kept.values()) == sorted([*range(375, 500)] * 2)
    assert any("of 1000 tags in ss_tag_frequency the 250 most frequent are kept" in one for one in warnings_of(account))


def test_large_metadata_of_both_inputs_goes_into_one_file_that_is_read(tmp_path):
    many = [{f"a tag of {side} with a number {n}": n for n in range(20_000)} for side in "ab"]
    merged = merge(pair(*({"ss_tag_frequency": json.dumps({"1_x": one})} for one in many)))
    save(merged, tmp_path / "x.safetensors")
    again = load(tmp_path / "x.safetensors")
    assert len(json.loads(again.metadata["ss_tag_frequency"])["1_x"]) == 40_000
    assert metadata(tmp_path / "x.safetensors")["ss_tag_frequency"] == again.metadata["ss_tag_frequency"]


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("letters", [1, 60, 150])
def test_max_mb_holds_in_either_format(tmp_path, format, letters):
    """diffusers' adapter config names a module three times: as a target, and with a rank and an alpha of its own."""
    state = {}
    for number in range(200):
        up, down = factors(16, 8, 16, seed=number)
        weights = torch.logspace(0, -(number % 7), 8)
        state |= kohya(f"transformer.{'x' * letters}.{number}.to_q", up * weights, down)
    lora = Lora.from_state_dict(state)
    save(lora, tmp_path / "whole.safetensors", format=format)
    megabytes = (tmp_path / "whole.safetensors").stat().st_size / 1e6
    small = resize(lora, max_mb=megabytes, out_dtype=torch.float16)
    assert len({layer.rank for layer in small.modules.values()}) > 3
    save(small, tmp_path / "x.safetensors", format=format)
    # The bound is one from above, of either format.
    assert 0.6 * megabytes < (tmp_path / "x.safetensors").stat().st_size / 1e6 <= megabytes


def test_metadata_counts_in_the_size_of_a_file(tmp_path):
    big = {"ss_tag_frequency": json.dumps({"1_x": {f"tag {n}": 1 for n in range(1000)}})}
    lora = Lora.from_state_dict(kohya(MODULE, *factors(64, 32, 64, seed=3)), metadata=big)
    save(resize(lora, max_mb=0.03, out_dtype=torch.float16), tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_size <= 30_000
    with pytest.raises(ValueError, match=r"what is not cut \(header, metadata, biases, whole weights\) takes"):
        resize(lora, max_mb=0.015)


USELESS = ["[" * 100_000, "{", "5", "null", '{"a": NaN}', '{"a": {"b": 1e999}}', r'{"a": {"\ud800": 1}}', '{"a": 1, "a": 2}',
           '{"inputs": 5}', '{"inputs": [{"name": 1}]}', '{"a": [1]}', '{"a": {"b": "c"}}', '{"a": {"b": ' + "9" * 400 + "}}"]  # fmt: skip


NO_OBJECT = USELESS[:8]
CASES = [(key, text) for key in ("lcm_kit.merge", "ss_tag_frequency") for text in USELESS]
CASES += [(key, text) for key in ("lora_adapter_metadata", "alpha_pattern") for text in NO_OBJECT]


@pytest.mark.parametrize(("key", "text"), CASES, ids=range(len(CASES)))
def test_metadata_of_no_use_costs_a_sentence_and_nothing_else(tmp_path, key, text, capsys):
    save_file(kohya(MODULE, *factors(8, 2, 6), alpha=1), tmp_path / "x.safetensors", {key: text})
    lora = load(tmp_path / "x.safetensors")
    identify(lora)
    sentences = [line for line in describe_metadata(lora.metadata) if f"Its metadata {key} is left aside" in line]
    assert len(sentences) == 1
    _, account = merge_with_account([(lora, 1.0), (small(), 1.0)], protect="auto", mu=1.0)
    assert sum(f"x.safetensors: its metadata {key} is left aside" in one for one in warnings_of(account)) == 1
    save(merge([(lora, 1.0), (small(), 1.0)]), tmp_path / "merged.safetensors")
    load(tmp_path / "merged.safetensors")
    assert main(["info", str(tmp_path / "x.safetensors")]) == 0
    assert f"Its metadata {key} is left aside" in capsys.readouterr().out


BAD = {"a surrogate": "\ud800", "a number": 5, "bytes": b"x", "nothing": None, "a list": ["x"]}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_what_no_file_can_hold_is_refused_and_nothing_is_written(tmp_path, value):
    for notes in ({"note": value}, {value: "note"} if isinstance(value, str) else {"note": value}):
        with pytest.raises(ValueError, match="names and values have to be text"):
            save(Lora(small().modules, metadata=notes), tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="names and values have to be text"):
            save(small(), tmp_path / "x.safetensors", metadata=notes)
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_would_be_too_long_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("lcm_kit.lora_merge.disk.header.MAX_HEADER", 5000)
    with pytest.raises(ValueError, match=r"nobody could read it again.*leave out metadata"):
        save(small(note="x" * 5000), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- what somebody wants to be said


@pytest.mark.parametrize("command", ["merge", "resize", "extract"])
def test_commands_write_what_they_are_told(files, command, capsys):
    rest = {"merge": ["style", "lcm"], "resize": ["style"], "extract": ["tuned", "base"]}[command]
    out = files / "out.safetensors"
    meta = ["--meta", "modelspec.title=A = B", "--meta", "modelspec.author=Zoë", "--meta", "my.own=1", "--rank", "4"]
    assert main([command, *(str(files / f"{one}.safetensors") for one in rest), "-o", str(out), *meta]) == 0
    said = metadata(out)
    assert (said["modelspec.title"], said["modelspec.author"], said["my.own"]) == ("A = B", "Zoë", "1")
    assert_hashes_are_true(out)
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    text = capsys.readouterr().out
    assert "title: A = B" in text
    assert f"sha256 of the weights: {said['sshs_model_hash']}, as the file says" in text


def test_an_empty_value_takes_an_entry_away(files):
    lora = small(modelspec__author="Ann", modelspec__title="Ink")
    assert "modelspec.author" not in merge([(lora, 1.0)], metadata={"modelspec.author": ""}).metadata
    save(lora, files / "x.safetensors", metadata={"modelspec.author": "", "modelspec.title": ""})
    said = metadata(files / "x.safetensors")
    assert "modelspec.author" not in said
    assert said["modelspec.title"] == "x"


COMPUTED = [*HASHES, "modelspec.hash_md5", "modelspec.date", "modelspec.merged_from", "modelspec.sai_model_spec", "format",
            "ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args", "ss_output_name", "lora_alpha", "r",
            "lora_adapter_metadata", "lcm_kit.merge", "lcm_kit.preset", "lcm_kit.anything"]  # fmt: skip


@pytest.mark.parametrize("key", COMPUTED)
def test_what_is_computed_cannot_be_given(files, key, capsys):
    out = files / "out.safetensors"
    for command in (["merge"], ["resize", "--rank", "2"]):
        assert main([*command, str(files / "style.safetensors"), "-o", str(out), "--meta", f"{key}=1"]) == 2
        error = capsys.readouterr().err
        assert f"metadata {key}: this is computed" in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match="this is computed from what is saved"):
        merge([(small(), 1.0)], metadata={key: "1"})
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title", "has to be KEY=VALUE"),
        ("=x", "a name has 1 to 200 printable characters"),
        (" a=x", "no space around it"),
        ("a\n=x", "printable characters"),
        ("x" * 201 + "=1", "a name has 1 to 200"),
        ("a=\udcff", "names and values have to be text"),
    ],
)
def test_what_is_no_entry_is_refused(files, text, words, capsys):
    out = str(files / "out.safetensors")
    assert main(["merge", str(files / "style.safetensors"), "-o", out, "--meta", text]) == 2
    assert words in capsys.readouterr().err
    assert main(["merge", str(files / "style.safetensors"), "-o", out, "--meta", "a=1", "--meta", "a=2"]) == 2
    assert "gives a twice" in capsys.readouterr().err


# ---- what people read


def test_info_shows_names_words_and_tags_in_lines_that_print(tmp_path, capsys):
    notes = {
        "modelspec.title": "Ink",
        "modelspec.license": "MIT",
        "modelspec.trigger_phrase": "inkstyle",
        "trained_words": '["inkstyle", "brush"]',
        "modelspec.description": "two\nlines \x1b[31m" + "x" * 1000,
        "ss_tag_frequency": json.dumps({"a": {"cat": 1, "dog": 5}, "b": {"cat": 6}}),
        "modelspec.hash_sha256": "0x" + "1" * 64,
    }
    save_file(kohya(MODULE, *factors(8, 2, 6)), tmp_path / "x.safetensors", notes)
    assert main(["info", str(tmp_path / "x.safetensors")]) == 0
    text = capsys.readouterr().out
    for line in ("title: Ink", "licence: MIT", "trigger words: inkstyle, brush", "most frequent tags: cat, dog"):
        assert f"  {line}\n" in text
    assert "  description: two lines ?[31mxxx" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 250
    assert "the file says 1111" in text
    assert "which is untrue" in text


def test_an_account_of_inputs_prints_in_lines_whatever_their_names(tmp_path, capsys):
    name = tmp_path / "x.safetensors"
    save(merge([(small(source="a"), 1.0)] * 60), name)
    with safe_open(name, framework="pt") as file:
        notes = file.metadata()
    notes["lcm_kit.merge"] = notes["lcm_kit.merge"].replace('"a"', json.dumps("a\n\x1b[31m" + "b" * 500))
    save_file(load_file(name), name, notes)
    assert main(["info", str(name)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert text.count("    a ?[31mbbb") == 50
    assert "    and 10 more\n" in text


def test_trigger_words_are_found_wherever_programs_put_them():
    assert trigger_words({"activation text": "a, b", "ss_trained_words": '["b", "c"]', "trigger_word": "["}) == [
        "[",
        "b",
        "c",
        "a",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('["a", " b ", ""]', ["a", "b"]),
        ('["a", 1]', ['["a"', "1]"]),
        ("[1]", ["[1]"]),
        ("[]", []),
        (" [ ", ["["]),
        ("a,, b ,a", ["a", "b"]),
    ],
)
def test_words_are_those_of_a_list_of_texts_or_stand_between_commas(text, words):
    assert trigger_words({"trained_words": text}) == words


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("LoRA", "networks.lora_flux", "networks.lora_flux"),
        ("LoRA", "networks.lora", "networks.lora"),
        ("LoRA", "lycoris.kohya", "networks.lora"),
        ("LoRA", None, "networks.lora"),
        ("LoHa", "networks.lora_flux", "lycoris.kohya"),
    ],
)
def test_a_trainers_word_for_its_network_stays_where_it_is_true(kind, before, after):
    notes = {} if before is None else {"ss_network_module": before}
    one = Lora.from_state_dict(kinds.state_dict(kind, MODULE), metadata=notes)
    assert for_file(one, "x", "kohya")["ss_network_module"] == after


def test_different_ranks_are_called_dynamic(tmp_path):
    lora = Lora.from_state_dict(kohya(MODULE, *factors(8, 4, 6)) | kohya("lora_unet_conv_in", *factors(8, 2, 6)))
    save(lora, tmp_path / "x.safetensors")
    assert metadata(tmp_path / "x.safetensors")["ss_network_dim"] == "Dynamic"


@pytest.mark.parametrize(("kernel", "reaches"), [((), False), ((1, 1), False), ((2, 2), True), ((1, 3), True)])
def test_a_convolution_is_what_reaches_beyond_a_pixel(tmp_path, kernel, reaches):
    """As kohya's trainer has it: conv_dim is the rank of the others, a convolution of 1 x 1 counts with the linear layers."""
    module, other = "lora_unet_output_blocks_5_2_conv", "lora_unet_middle_block_1_proj_in"
    alone = kohya(module, *factors(8, 4, 6, kernel), 2.0)
    save(Lora.from_state_dict(alone), tmp_path / "alone.safetensors")
    notes = metadata(tmp_path / "alone.safetensors")
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("4", "2")
    save(Lora.from_state_dict(alone | kohya(other, *factors(8, 3, 6), 3.0)), tmp_path / "both.safetensors")
    both = metadata(tmp_path / "both.safetensors")
    assert both["ss_network_dim"] == ("3" if reaches else "Dynamic")
    wanted = {"conv_dim": "4", "conv_alpha": "2"} if reaches else {}
    assert [json.loads(one.get("ss_network_args", "{}")) for one in (notes, both)] == [wanted, wanted]


def test_what_was_said_of_the_network_stays_with_it_and_goes_with_another():
    """Dimensions and the algorithm are the file's own; the rest was an option of the trainer that made such a network."""
    said = {"conv_dim": "9", "conv_alpha": "9", "algo": "other", "block_dims": "1,2", "dropout": 0.1}
    kept = {"block_dims": "1,2", "dropout": 0.1}
    for kind, own in (("LoRA", {}), ("LoHa", {"algo": "loha"}), ("LoKr, both whole", {"algo": "lokr"})):
        for before in ("networks.lora", "networks.lora_flux", "lycoris.kohya", "other"):
            notes = {"ss_network_module": before, "ss_network_args": json.dumps(said)}
            found = for_file(Lora.from_state_dict(kinds.state_dict(kind, MODULE), metadata=notes), "x", "kohya")
            same = found["ss_network_module"] == before
            assert json.loads(found.get("ss_network_args", "{}")) == (kept if same else {}) | own
        odd = Lora.from_state_dict(kinds.state_dict(kind, MODULE), metadata={"ss_network_args": "["})
        assert json.loads(for_file(odd, "x", "kohya").get("ss_network_args", "{}")) == own
    two = kinds.state_dict("LoHa", MODULE) | kinds.state_dict("LoRA", "lora_unet_conv_out")
    found = for_file(Lora.from_state_dict(two), "x", "kohya")
    assert (found["ss_network_module"], found["ss_network_args"]) == ("lycoris.kohya", '{"algo": "mixed"}')
    whole = for_file(Lora.from_state_dict({f"{MODULE}.diff": torch.ones(8, 6)}), "x", "kohya")
    assert (whole["ss_network_module"], whole["ss_network_args"]) == ("lycoris.kohya", '{"algo": "full"}')
    assert (whole["ss_network_dim"], whole["ss_network_alpha"]) == ("Dynamic", "Dynamic")


@pytest.mark.parametrize("letters", [1, 30, 200])
def test_every_module_takes_as_much_off_max_mb_as_its_header_can_be_long(letters):
    """Of kohya's three tensors: the names, and shapes and offsets as long as they get."""
    numbers = '":{"dtype":"BF16","shape":[99999,99999,9,9],"data_offsets":[9999999999,9999999999]},'
    modules = [f"{number:03}{'x' * letters}" for number in range(100)]
    spellings = dict(zip(modules, modules, strict=True))

    def room(count):
        options = MergeOptions(max_mb=1.0, out_dtype=torch.float16)
        return 2 * numbers_within(options, [], modules[:count], {}, spellings, {}, 0)

    longest = [f'"{modules[0]}{end}{numbers}' for end in (".lora_up.weight", ".lora_down.weight", ".alpha")]
    assert room(0) - room(100) >= 100 * sum(map(len, longest))
