"""sha256 of whole files, computed once."""

import hashlib
import json
import os

import pytest

from lcm_kit.lora_merge.disk import digests
from lcm_kit.lora_merge.disk.digests import keep_in, sha256_of

LONG_AGO = 10**18


@pytest.fixture
def computed(monkeypatch):
    """The files that were read, by a process that knows none yet."""
    found = []
    real = digests._computed
    monkeypatch.setattr(digests, "_computed", lambda path: found.append(os.fspath(path)) or real(path))
    monkeypatch.setattr(digests, "_digests", {})
    monkeypatch.setattr(digests, "_kept_in", None)
    return found


def put(path, content=b"weights", when=LONG_AGO):
    path.write_bytes(content)
    os.utime(path, ns=(when, when))
    return path


def again(monkeypatch, file):
    """As the next run of a server."""
    monkeypatch.setattr(digests, "_digests", {})
    monkeypatch.setattr(digests, "_kept_in", None)
    keep_in(file)


def test_a_hash_is_computed_once_for_each_state_of_a_file(tmp_path, computed):
    file = put(tmp_path / "x")
    first = sha256_of(file)
    assert first == sha256_of(str(file)) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(computed) == 1
    put(file, b"others!", LONG_AGO + 1)
    assert sha256_of(file) == hashlib.sha256(b"others!").hexdigest()
    assert len(computed) == 2


def test_a_file_larger_than_a_block_is_hashed_whole(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 4096 * 3 + b"end")
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_was_computed_once_is_known_to_the_next_run(tmp_path, computed, monkeypatch):
    kept, files = tmp_path / "new folder" / "sha256.json", [put(tmp_path / n, n.encode()) for n in ("a", "ä")]
    keep_in(kept)
    wanted = [sha256_of(file) for file in files]
    again(monkeypatch, kept)
    assert [sha256_of(file) for file in files] == wanted
    assert len(computed) == 2
    # A file that is changed, or another one of that name, is none that is known.
    put(files[0], b"c", LONG_AGO + 1)
    os.replace(put(tmp_path / "other", b"\xc3\xa5"), files[1])
    again(monkeypatch, kept)
    assert [sha256_of(file) for file in files] == [hashlib.sha256(text).hexdigest() for text in (b"c", b"\xc3\xa5")]


def test_a_file_that_was_changed_a_moment_ago_is_not_trusted_the_next_time(tmp_path, computed, monkeypatch):
    """It may change again within one step of its time."""
    kept, file = tmp_path / "sha256.json", tmp_path / "x"
    file.write_bytes(b"weights")
    keep_in(kept)
    sha256_of(file)
    again(monkeypatch, kept)
    sha256_of(file)
    assert len(computed) == 2


def test_two_servers_keep_what_both_have_computed(tmp_path, computed, monkeypatch):
    kept, one, other = tmp_path / "sha256.json", put(tmp_path / "a"), put(tmp_path / "b")
    keep_in(kept)
    sha256_of(one)
    monkeypatch.setattr(digests, "_digests", {})
    sha256_of(other)
    again(monkeypatch, kept)
    sha256_of(one), sha256_of(other)
    assert len(computed) == 2


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "[]",
            "{}",
            '{"files": 5}',
            '{"files": [[1]]}',
            '{"files": [["x", 1, 2, 3, "no digits"]]}',
            "[" * 9999,
        ),
        json.dumps({"files": [["x", 1, 2, 3, None]]}),
        json.dumps({"files": [["x", "a", 2, 3, "0" * 64]]}),
    ],
)
def test_a_damaged_file_of_hashes_costs_nothing_but_time(tmp_path, computed, monkeypatch, text):
    kept, file = tmp_path / "sha256.json", put(tmp_path / "x")
    kept.write_text(text)
    keep_in(kept)
    assert sha256_of(file) == hashlib.sha256(b"weights").hexdigest()
    again(monkeypatch, kept)
    sha256_of(file)
    assert len(computed) == 1


def test_where_nothing_can_be_written_hashes_are_computed_all_the_same(tmp_path, computed):
    put(tmp_path / "no folder")
    keep_in(tmp_path / "no folder" / "sha256.json")
    assert sha256_of(put(tmp_path / "x")) == hashlib.sha256(b"weights").hexdigest()
