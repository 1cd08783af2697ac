"""Files appear complete or not at all, old ones stay until then, and killed runs leave nothing for ever."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from lcm_kit.lora_merge import Lora, save
from lcm_kit.lora_merge.disk import whole
from lcm_kit.lora_merge.disk.whole import check_place, held, is_plain_file, write_whole
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.lora_merge.make import factors, kohya

LORA = Lora.from_state_dict(kohya("lora_unet_conv_in", *factors(8, 2, 6)))
POSIX = pytest.mark.skipif(os.name != "posix", reason="locks, permissions and limits of POSIX")


def content(text):
    return lambda file: file.write(text)


def anything(path):
    """A guard that lets everything be replaced."""


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "/some/where/.x.0123abcd.tmp")

    return fail


# ---- whole or not at all


@pytest.mark.parametrize("error", [ValueError("in the middle"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path, error, old):
    path = tmp_path / "x"
    if old:
        path.write_bytes(old)

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, write, anything)
    assert names(tmp_path) == (["x"] if old else [])
    assert old is None or path.read_bytes() == old


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        assert path.read_bytes() == b"old"

    write_whole(path, write, anything)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["x"]


def test_a_temporary_file_that_somebody_tidied_away_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    """By the next run of that name, which takes it for a leftover."""
    real, tried = whole._locked, []

    def locked(file):
        tried.append(file.name)
        if len(tried) < 3:
            os.unlink(file.name)
        return real(file)

    monkeypatch.setattr(whole, "_locked", locked)
    write_whole(tmp_path / "x", content(b"new"))
    assert len(set(tried)) == 3
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_name_that_is_taken_meanwhile_is_not_lost(tmp_path):
    path = tmp_path / "x"

    def write(file):
        file.write(b"ours")
        path.write_bytes(b"theirs")

    with pytest.raises(FileExistsError, match="exists already"):
        write_whole(path, write)
    assert path.read_bytes() == b"theirs"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("guard", [whole.refuse, anything])
def test_a_disk_without_hard_links_is_written_too(tmp_path, monkeypatch, guard):
    monkeypatch.setattr(whole.os, "link", failing(errno.EPERM))
    write_whole(tmp_path / "x", content(b"new"), guard)
    assert (tmp_path / "x").read_bytes() == b"new"
    assert names(tmp_path) == ["x"]
    if guard is whole.refuse:
        with pytest.raises(FileExistsError):
            write_whole(tmp_path / "x", content(b"newer"), guard)


# ---- what is said


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EROFS, False),
                                              (errno.EACCES, False), (errno.EIO, False), (errno.ENOENT, False)])  # fmt: skip
def test_the_real_error_is_told_with_the_files_own_name(tmp_path, monkeypatch, step, number, full):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr(whole.os, step, failing(number))
    # As on a disk that takes nothing any more: the leftover cannot be removed either, and that is not the news.
    monkeypatch.setattr(whole.Path, "unlink", failing(errno.EROFS))
    with pytest.raises(OSError, match="could not be written") as failure:
        write_whole(path, content(b"new"), anything)
    said = str(failure.value)
    assert said.startswith(f"{path}: could not be written ({os.strerror(number)})")
    assert ("is the disk full?" in said) == full
    assert ".tmp" not in said
    assert path.read_bytes() == b"old"


@POSIX
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match=r"x\.safetensors: could not be written \(Permission denied\)\.$"):
            save(LORA, tmp_path / "x.safetensors")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is a folder"),
        ("folder.safetensors", "is a folder"),
        ("none/x.safetensors", "there is no such folder"),
        ("file/x.safetensors", "is a file and no folder"),
        ("n" * 5000 + "/x.safetensors", "there is no such folder"),
        ("a\0b/x.safetensors", "there is no such folder"),
        ("a\0b.safetensors", "nobody sees"),
        ("a\nb.safetensors", "nobody sees"),
        ("con.safetensors", "device"),
        ("a:b.safetensors", "not every system"),
        ("n" * 244 + ".safetensors", "256 bytes"),
        ("x.SAFETENSORS", "has to end in .safetensors"),
        ("x", "has to end in .safetensors"),
    ],
)
def test_a_bad_output_is_refused_before_anything_is_written(tmp_path, name, said):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    for overwrite in (False, True, "any"):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            save(LORA, f"{tmp_path}/{name}", overwrite=overwrite)
    assert names(tmp_path) == ["file", "folder.safetensors"]


@pytest.mark.parametrize("length", [1, 200, 229, 230, 231, 242, 243])
@pytest.mark.parametrize("letter", ["n", "é", "語"])
def test_the_longest_legal_names_are_written_and_overwritten(tmp_path, length, letter):
    name = letter * (length // len(letter.encode()) or 1) + ".safetensors"
    for _ in range(2):
        save(LORA, tmp_path / name, overwrite=True)
    assert names(tmp_path) == [name]


# ---- leftovers


def leave(folder, name):
    """What a run leaves that is killed in the middle."""
    leftover = folder / f"{whole._beginning(name)}.0123abcd.tmp"
    leftover.write_bytes(b"half")
    if whole.fcntl is None:
        os.utime(leftover, (1, 1))
    return leftover


@pytest.mark.parametrize("name", ["x.safetensors", "n" * 240, "é" * 120])
def test_the_next_write_of_a_name_tidies_up_after_killed_ones(tmp_path, name):
    others = {
        tmp_path / other for other in (".y.safetensors.0123abcd.tmp", f".{name[:200]}.tmp", "x.0123abcd.tmp", ".x.tmp")
    }
    others |= {tmp_path / f".{name[:200]}.0123abcd.tmpx", tmp_path / f".{name[:200]}.0123ABCD.tmp"}
    for other in others:
        other.touch()
    leave(tmp_path, name)
    write_whole(tmp_path / name, content(b"new"))
    assert names(tmp_path) == sorted([name, *(other.name for other in others)])


@POSIX
def test_what_another_process_is_writing_is_left_alone(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom disk.whole import write_whole\n"
        "def write(file):\n    file.write(b'slow')\n    file.flush()\n    print('begun', flush=True)\n    sys.stdin.read()\n"
        "write_whole(Path(sys.argv[1]), write)\n"
    )
    path = tmp_path / "x"
    command = [sys.executable, "-c", code, str(path)]
    slow = subprocess.Popen(
        command, cwd=ROOT / "lora_merge", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert slow.stdout.readline() == b"begun\n"
        os.utime(next(tmp_path.glob(".x.*.tmp")), (1, 1))  # even one that has not changed for long
        write_whole(path, content(b"quick"))
        assert len(names(tmp_path)) == 2
        _, said = slow.communicate(timeout=60)
        assert b"exists already" in said
    finally:
        slow.kill()
        slow.wait()
    assert names(tmp_path) == ["x"]
    assert path.read_bytes() == b"quick"


def test_many_writers_of_one_name_at_once_leave_one_whole_file(tmp_path):
    path, trouble = tmp_path / "x", []

    def write(number):
        try:
            for _ in range(20):
                write_whole(path, content(bytes([number]) * 50_000), anything)
                assert len(set(path.read_bytes())) == 1
        except Exception as error:
            trouble.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trouble == []
    assert names(tmp_path) == ["x"]
    assert len(path.read_bytes()) == 50_000


@POSIX
def test_where_files_cannot_be_locked_age_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(whole.fcntl, "flock", failing(errno.ENOLCK))
    old, new = leave(tmp_path, "x"), tmp_path / ".x.99999999.tmp"
    new.touch()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    write_whole(tmp_path / "x", content(b"new"))
    assert names(tmp_path) == [new.name, "x"]


@POSIX
def test_every_file_is_as_readable_as_any_other(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "x", content(b"new"))
        write_whole(tmp_path / "x", content(b"newer"), anything)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_the_place_is_checked_without_writing(tmp_path):
    check_place(tmp_path / "x")
    assert names(tmp_path) == []


@contextmanager
def room_for(size):
    """No file of this process may be larger, as if the disk were full."""
    import resource  # there is none on Windows

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@POSIX
@pytest.mark.parametrize("piece", [1, 100, 5000, 8191, 8192, 8193, 100_000, 3_000_000])
def test_the_words_stay_whatever_is_left_to_be_written(tmp_path, piece):
    path = tmp_path / "x"

    def fill(file):
        for _ in range(3_000_000 // piece):
            file.write(bytes(piece))

    with room_for(1_000_000), pytest.raises(OSError, match="x: could not be written "):
        write_whole(path, fill)
    assert names(tmp_path) == []


@POSIX
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_what_went_wrong_first_is_told(tmp_path, error):
    def fill(file):
        file.write(bytes(1_000_000))
        file.write(bytes(100))
        raise error

    with room_for(1_000_000), pytest.raises(type(error)):
        write_whole(tmp_path / "x", fill)
    assert names(tmp_path) == []


# ---- a name for one process


HOLD = """
import sys, time
from pathlib import Path
from lcm_kit.lora_merge.disk.whole import held
with held(Path(sys.argv[1])) as free:
    print(free, flush=True)
    time.sleep(600)
"""


@POSIX
def test_a_name_is_one_process_s_until_it_ends_however_that_is(tmp_path):
    path = tmp_path / "run.safetensors"
    script = (
        f"import importlib.util as u, sys; s = u.spec_from_file_location('lcm_kit', {str(ROOT / '__init__.py')!r}, "
    )
    script += f"submodule_search_locations=[{str(ROOT)!r}]); sys.modules['lcm_kit'] = u.module_from_spec(s)\n{HOLD}"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "True\n"
            with held(path) as free:
                assert free is False
            with held(tmp_path / "another.safetensors") as free:
                assert free is True
        finally:
            other.kill()
    assert names(tmp_path) == [".run.safetensors.lock"]  # of the one that was killed
    for _ in range(2):
        with held(path) as free:
            assert free is True
            with held(path) as again:
                assert again is False
    assert names(tmp_path) == []


def test_where_nothing_can_be_locked_the_name_is_free(tmp_path):
    with held(tmp_path / "no such folder" / "x") as free:
        assert free is True


@POSIX
@pytest.mark.parametrize("size", [100, 50_000])
@pytest.mark.parametrize("ends", [True, False])
def test_a_disk_that_takes_no_more_is_told_with_the_file_s_name_and_interrupts_stay_interrupts(tmp_path, size, ends):
    """What is small lies in Python's buffer until the file is closed, and the system refuses it then once more."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "x"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(file):
        file.write(bytes(size))
        if not ends:
            raise KeyboardInterrupt

    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt if not ends and size == 100 else OSError) as raised:
            write_whole(path, write, anything)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    if isinstance(raised.value, OSError):
        assert f"{path}: could not be written" in str(raised.value)
    assert names(tmp_path) == []


@POSIX
def test_a_plain_file_is_one_that_can_be_read_without_waiting(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    found = {name: is_plain_file(tmp_path / name) for name in ("file", "link", "nowhere", "pipe", "none", ".", "a\0b")}
    assert found == {"file": True, "link": True} | dict.fromkeys(("nowhere", "pipe", "none", ".", "a\0b"), False)
