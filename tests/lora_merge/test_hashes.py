"""The hashes of a file's tensors, against hashlib over the whole of it, and what a file states of itself."""

import hashlib

import pytest

from lcm_kit.lora_merge.disk.hashes import BLANK, LEGACY, MODEL, MODELSPEC, Hashes, stated, training

TRUE, OTHER = "0123456789abcdef" * 4, "ab" * 32


@pytest.mark.parametrize("head", [1, 1000, 0x100000 - 1, 0x100000, 0x108000, 0x110000, 0x110001])
@pytest.mark.parametrize("piece", [0x4000, 0x10000, 0x150000])
def test_the_legacy_hash_is_of_64_kb_behind_the_first_megabyte_however_the_data_come(head, piece):
    begin = bytes(range(256)) * (head // 256 + 1)
    data = b"lcm kit" * 0x30000
    hashes = Hashes(begin[:head])
    for start in range(0, len(data), piece):
        hashes.add(memoryview(data)[start : start + piece])
    whole = begin[:head] + data
    model = hashlib.sha256(data).hexdigest()
    legacy = hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    assert hashes.found() == {MODEL: model, LEGACY: legacy, MODELSPEC: f"0x{model}"}
    assert {key: len(value) for key, value in hashes.found().items()} == {key: len(one) for key, one in BLANK.items()}


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({}, None),
        ({MODELSPEC: f"0x{TRUE}"}, TRUE),
        ({MODELSPEC: f"0X{TRUE.upper()}"}, TRUE),
        ({MODELSPEC: TRUE}, TRUE),
        ({MODEL: TRUE}, TRUE),
        ({MODELSPEC: f"0x{TRUE}", MODEL: OTHER}, TRUE),
        # What is no sha256 states nothing, whether it is too short, too long or no hexadecimal number.
        ({MODELSPEC: "0x", MODEL: OTHER}, OTHER),
        ({MODELSPEC: TRUE[:-1]}, None),
        ({MODELSPEC: f"{TRUE}0"}, None),
        ({MODEL: "g" * 64}, None),
        ({MODEL: f"{TRUE[:-1]} "}, None),
        ({LEGACY: TRUE[:8]}, None),
    ],
)
def test_a_file_states_the_sha256_of_its_weights_or_none(metadata, found):
    assert stated(metadata) == found


def test_training_metadata_is_what_kohyas_trainers_write():
    assert training({"ss_a": "1", "sshs_model_hash": "2", "modelspec.title": "3", "xss_": "4"}) == {"ss_a": "1"}
