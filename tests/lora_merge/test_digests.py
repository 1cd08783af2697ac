"""sha256 of whole files, computed once."""

import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lcm_kit.lora_merge.disk import digests
from lcm_kit.lora_merge.disk.digests import keep_in, sha256_of

LONG_AGO = 10**18


@pytest.fixture
def computed(monkeypatch):
    """The files that were read, by a process that knows none yet."""
    found = []
    real = digests._computed
    monkeypatch.setattr(digests, "_computed", lambda path, *rest: found.append(os.fspath(path)) or real(path, *rest))
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


def test_who_asks_for_a_hash_that_is_being_computed_waits_for_it(tmp_path, computed, monkeypatch):
    """A merge hashes its inputs beside the work, which may have to know what an input is."""
    file, begun, others = put(tmp_path / "x"), threading.Event(), threading.Barrier(4)
    slow = digests._computed

    def computing(*given):
        begun.set()
        others.wait(10)
        return slow(*given)

    monkeypatch.setattr(digests, "_computed", computing)

    def ask(_):
        begun.wait(10)
        others.wait(10)
        return sha256_of(file)

    with ThreadPoolExecutor(4) as pool:
        first, *rest = pool.submit(sha256_of, file), *(pool.submit(ask, n) for n in range(3))
        assert {one.result(10) for one in (first, *rest)} == {hashlib.sha256(b"weights").hexdigest()}
    assert len(computed) == 1
    assert not digests._turns


def test_who_waits_for_a_hash_that_is_given_up_computes_it(tmp_path, computed):
    file = put(tmp_path / "x")
    with pytest.raises(InterruptedError):
        sha256_of(file, lambda: True)
    assert sha256_of(file) == hashlib.sha256(b"weights").hexdigest()
    assert not digests._turns


def test_a_file_larger_than_a_block_is_hashed_whole(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 4096 * 3 + b"end")
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_was_computed_once_is_known_to_the_next_run(tmp_path, computed, monkeypatch):
    kept, files = tmp_path / "new folder" / "in it" / "sha256.json", [put(tmp_path / n, n.encode()) for n in ("a", "ä")]
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


def test_so_many_hashes_are_known_at_once_and_the_oldest_go_first(tmp_path, computed, monkeypatch):
    monkeypatch.setattr(digests, "_MANY", 3)
    kept, files = tmp_path / "sha256.json", [put(tmp_path / name, name.encode()) for name in "abcd"]
    keep_in(kept)
    for count, file in enumerate(files, 1):
        sha256_of(file)
        assert [key[0] for key in digests._digests] == [str(one) for one in files[max(0, count - 3) : count]]
        assert [entry[0] for entry in json.loads(kept.read_text())["files"]] == [key[0] for key in digests._digests]
    assert len(computed) == 4
    for file in files[1:]:
        sha256_of(file)
    assert len(computed) == 4
    sha256_of(files[0])
    assert len(computed) == 5


def test_what_another_server_has_computed_is_read_once(tmp_path, computed, monkeypatch):
    """Whoever says the same place again is not told anew; another place is looked at, and written to from then on."""
    one, other, file = tmp_path / "one.json", tmp_path / "other.json", put(tmp_path / "x")
    keep_in(one)
    digest = sha256_of(file)
    entry = json.loads(one.read_text())["files"]
    other.write_text(json.dumps({"files": [[*entry[0][:3], 12345, "ab" * 32], *entry]}))
    reads = []
    real = digests._kept
    monkeypatch.setattr(digests, "_kept", lambda place: reads.append(place) or real(place))
    keep_in(one)
    assert reads == []
    keep_in(other)
    assert reads == [other]
    # What is known already holds against what somebody wrote down.
    assert {key[3]: value for key, value in digests._digests.items()} == {12345: "ab" * 32, entry[0][3]: digest}
    again(monkeypatch, other)
    sha256_of(put(tmp_path / "y"))
    assert len(json.loads(other.read_text())["files"]) == 3
    assert len(json.loads(one.read_text())["files"]) == 1


@pytest.mark.parametrize("age", [0, 1])
def test_a_file_is_settled_two_seconds_after_it_was_changed(tmp_path, computed, monkeypatch, age):
    now = 2 * 10**18
    monkeypatch.setattr(digests.time, "time_ns", lambda: now)
    kept, file = tmp_path / "sha256.json", put(tmp_path / "x", when=now - 2 * 10**9 - age)
    keep_in(kept)
    sha256_of(file)
    assert len(json.loads(kept.read_text())["files"]) == age
