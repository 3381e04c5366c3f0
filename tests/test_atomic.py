"""Files that appear whole or not at all: links, modes, devices, leftovers."""

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from subbyte import SubbyteError
from subbyte.core import atomic
from subbyte.core.atomic import check_writable, write_atomically


def test_a_link_stays_and_its_target_is_written(tmp_path):
    store = tmp_path / "deep" / "store"
    store.parent.mkdir()
    link = tmp_path / "latest"
    link.symlink_to(store)  # dangling at first
    for data in (b"one", b"two"):
        write_atomically(link, data)
        assert link.is_symlink()
        assert store.read_bytes() == data


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_the_mode_of_an_older_file_stays(tmp_path, mode):
    path = tmp_path / "net"
    path.write_bytes(b"")
    path.chmod(mode)
    write_atomically(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "net", b"")
    assert (tmp_path / "net").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("write", [lambda p: write_atomically(p, b"x"), check_writable])
def test_what_is_no_file_is_refused_and_untouched(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "null"):
        with pytest.raises(SubbyteError, match=r"it is a (folder|device)"):
            write(path)
    assert Path("/dev/null").is_char_device()


def test_a_place_that_cannot_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SubbyteError, match=r"cannot write .*(Not a directory|File exists)"):
        check_writable(tmp_path / "file" / "net")
    check_writable(tmp_path / "new" / "net")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("nameless", [True, False])
def test_a_kill_while_writing_leaves_nothing_for_long(tmp_path, nameless):
    path = tmp_path / "net"
    path.write_bytes(b"old")
    code = (
        "import os, sys; from pathlib import Path; from subbyte.core import atomic\n"
        f"if not {nameless}: atomic._open_nameless = lambda folder: None\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "atomic.write_atomically(Path(sys.argv[1]), b'x' * 9999)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_bytes() == b"old"
    if nameless and atomic._open_nameless(tmp_path) is not None:
        assert [p.name for p in tmp_path.iterdir()] == ["net"]
    write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert path.read_bytes() == b"new"


def test_what_another_process_is_writing_stays(tmp_path):
    other = tmp_path / f"{atomic._PREFIX}abc"
    with other.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomically(tmp_path / "net", b"x")
        assert other.exists()
    write_atomically(tmp_path / "net", b"x")
    assert not other.exists()
