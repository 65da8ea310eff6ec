"""Files are whole or not there; the cache takes nothing that another user could have written."""

import errno
import grp
import os
import pwd
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nsa import files

ALONE = "compiled code is kept for this process alone, in .*"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A cache folder that is not there yet, in a process that has warned of nothing yet."""
    monkeypatch.setattr(files, "_temporary_dirs", {})
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(0o022)
    yield tmp_path / "cache"
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def give(path, user, monkeypatch):
    """As if the user of that number owned it: to change owners for real takes root."""
    real = Path.stat

    def as_if(each, **options):
        status = real(each, **options)
        owner = user if each == path else status.st_uid
        return SimpleNamespace(st_uid=owner, st_mode=status.st_mode, st_mtime_ns=status.st_mtime_ns)

    monkeypatch.setattr(Path, "stat", as_if)


def test_a_reader_of_the_old_file_never_sees_a_part_of_the_new(tmp_path):
    path = tmp_path / "result.json"
    files.write_aside(path, "old and long")
    with path.open() as reader:
        files.write_aside(path, "new")
        assert reader.read() == "old and long"
    assert path.read_text() == "new"


def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "result.json"
    files.write_aside(path, "old")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        files.write_aside(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, function=function: (calls.append(name), function(*args)))
    files.write_aside(tmp_path / "result.json", b"content")
    assert calls == ["fsync", "replace"]


def test_with_umask_0_the_cache_is_the_users_alone(own_cache, monkeypatch):
    monkeypatch.setenv("NSA_CACHE_DIR", str(own_cache / "deep" / "down"))
    os.umask(0)
    path = files.write_cached("12/1234.so", b"code")
    for folder in (path.parent, own_cache / "deep" / "down", own_cache / "deep", own_cache):
        assert mode(folder) == 0o700
    assert mode(path) == 0o644
    with files.cache_lock("build"):
        assert mode(own_cache / "deep" / "down" / "build.lock") == 0o600


def test_a_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NSA_CACHE_DIR", "~/x")
    assert files.write_cached("a.so", b"code") == tmp_path / "home" / "x" / "a.so"
    monkeypatch.delenv("NSA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert files.cache_dir() == tmp_path / "home" / "xdg" / "nsa-ascend"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_dir() == tmp_path / "home" / ".cache" / "nsa-ascend"
    assert not (tmp_path / "~").exists()


@pytest.fixture
def group(monkeypatch):
    """Sets name and members of every file's group; the owner is "me"."""
    monkeypatch.setattr(pwd, "getpwuid", lambda number: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(pwd, "getpwall", list)

    def is_called(name, *members):
        monkeypatch.setattr(grp, "getgrgid", lambda number: SimpleNamespace(gr_name=name, gr_mem=list(members)))

    is_called("users")
    return is_called


def test_a_group_of_the_user_alone_may_write(own_cache, group, monkeypatch):
    path = files.write_cached("a.so", b"code")
    path.chmod(0o664)
    own_cache.chmod(0o775)
    for name, *members in (("users",), ("me", "another"), ("me", "me", "another")):
        group(name, *members)
        assert "others than its owner may write" in files.why_refused(path)
    for members in ((), ("me",)):
        group("me", *members)
        assert files.why_refused(path) is None
    path.chmod(0o666)
    assert "others than its owner may write" in files.why_refused(path)
    path.chmod(0o664)
    other = SimpleNamespace(pw_name="another", pw_gid=path.stat().st_gid)
    monkeypatch.setattr(pwd, "getpwall", lambda: [other])  # who has it as the group to begin with is no listed member
    assert "others than its owner may write" in files.why_refused(path)


def test_the_group_of_root_is_one_of_others(own_cache, group, monkeypatch):
    path = files.write_cached("a.so", b"code")
    path.chmod(0o664)
    group("root")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: SimpleNamespace(pw_name="root"))
    assert "others than its owner may write" in files.why_refused(path)


def test_a_group_without_a_name_may_have_others_in_it(own_cache, monkeypatch):
    path = files.write_cached("a.so", b"code")
    path.chmod(0o664)

    def nameless(number):
        raise KeyError(number)

    monkeypatch.setattr(grp, "getgrgid", nameless)
    assert "others than its owner may write" in files.why_refused(path)


def test_what_others_may_write_is_refused(own_cache, group):
    path = files.write_cached("a.so", b"code")
    assert files.why_refused(path) is None
    assert files.why_refused(own_cache) is None
    for part, permissions in [
        (path, 0o666),
        (path, 0o664),
        (own_cache, 0o777),
        (own_cache, 0o1777),
        (own_cache, 0o770),
    ]:
        before = mode(part)
        part.chmod(permissions)
        assert files.why_refused(path) == f"others than its owner may write to {part} (chmod go-w)"
        part.chmod(before)
    own_cache.parent.chmod(0o777)  # they could put another folder in the place of ours
    assert files.why_refused(path) == f"others than its owner may write to {own_cache.parent} (chmod go-w)"
    own_cache.parent.chmod(0o1777)  # as /tmp is
    assert files.why_refused(path) is None


@pytest.mark.parametrize("part", ["file", "folder", "folder above"])
def test_what_another_user_owns_is_refused(part, own_cache, monkeypatch):
    path = files.write_cached("a.so", b"code")
    part = {"file": path, "folder": own_cache, "folder above": own_cache.parent}[part]
    give(part, 12345, monkeypatch)
    assert files.why_refused(path) == f"{part} belongs to another user, number 12345"
    message = f"{path} is not used: " if part == path else ALONE
    with pytest.warns(RuntimeWarning, match=f"{message}.*belongs to another user, number 12345"):
        assert list(files.cached_files("*.so")) == []


def test_what_root_owns_is_trusted_by_all(monkeypatch):
    """As in a system image that is read-only."""
    assert Path("/usr").stat().st_uid == 0
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert files.why_refused("/usr") is None


def test_folders_above_may_belong_to_a_root_that_a_container_does_not_know(own_cache, monkeypatch):
    """There they bear the number of nobody, and so does what other users own: files are refused all the same."""
    monkeypatch.setattr(files, "_unmapped_root", lambda: 65534)
    path = files.write_cached("a.so", b"code")
    give(own_cache.parent, 65534, monkeypatch)
    assert files.why_refused(path) is None
    give(own_cache, 65534, monkeypatch)
    assert files.why_refused(path) == f"{own_cache} belongs to another user, number 65534"


def test_a_link_is_judged_by_what_it_leads_to(own_cache, tmp_path):
    path = files.write_cached("a.so", b"code")
    (tmp_path / "link").symlink_to(own_cache)
    assert files.why_refused(tmp_path / "link" / "a.so") is None
    own_cache.chmod(0o777)
    assert str(own_cache) in files.why_refused(tmp_path / "link" / "a.so")
    own_cache.chmod(0o700)
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    assert list(files.cached_files("*.so")) == []


@pytest.mark.parametrize("reason", ["shared", "a file", "read-only", "no home", "full"])
def test_without_a_folder_to_write_a_process_keeps_its_own(reason, own_cache, monkeypatch):
    message = {
        "shared": "others than its owner may write to .*cache ",
        "a file": "File exists",
        "read-only": "cannot be written",
        "no home": "home",
        "full": "No space left",
    }[reason]
    if reason == "shared":
        own_cache.mkdir()
        own_cache.chmod(0o1777)
        (own_cache / "a.so").write_bytes(b"another's code")
    elif reason == "a file":
        own_cache.touch()
    elif reason == "read-only":
        own_cache.mkdir()
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, how: not how & os.W_OK and access(path, how)
        )  # root may anything
    elif reason == "no home":
        monkeypatch.setenv("NSA_CACHE_DIR", "~nobody-of-this-name/cache")
    else:
        replace = os.replace

        def full(source, target):
            if Path(target).parent == own_cache:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match=f"{ALONE}{message}.*NSA_CACHE_DIR") as warned:
        path = files.write_cached("a.so", b"code")
    assert len(warned) == 1
    assert mode(path.parent) == 0o700
    assert path.parent not in (own_cache, own_cache.parent)
    assert [path.read_bytes() for path in files.cached_files("*.so")] == [b"code"]  # without another warning
    files.write_cached("b.so", b"more")
    with files.cache_lock("build"):
        pass


def test_a_folder_that_is_read_only_is_read(own_cache, monkeypatch):
    path = files.write_cached("a.so", b"code")
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert list(files.cached_files("*.so")) == [path]


def python(code, **variables):
    """A process that has the module alone: importing all of nsa takes seconds."""
    head = f"import importlib.util, os; spec = importlib.util.spec_from_file_location('files', {files.__file__!r})\n"
    head += "files = importlib.util.module_from_spec(spec); spec.loader.exec_module(files)\n"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", head + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )


def test_a_process_removes_its_own_folder_and_its_child_does_not(tmp_path):
    code = """
path = files.write_cached("a.so", b"code")
child = os.fork()
if child == 0:
    raise SystemExit
os.waitpid(child, 0)
print(path, path.exists(), files._temporary_dir("") == path.parent)
"""
    with python(code, NSA_CACHE_DIR="/proc/nowhere", TMPDIR=str(tmp_path)) as process:
        path, *outcome = process.communicate()[0].split()
    assert outcome == ["True", "True"]
    assert Path(path).parent.parent == tmp_path
    assert not Path(path).parent.exists()


def test_one_process_at_a_time_and_a_dead_one_blocks_nobody(own_cache):
    """The second waits for the first, and goes on when the first is killed, though a forked child of it lives on."""
    holder = """
import time
with files.cache_lock("build"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""
    with python(holder) as first:
        child = int(first.stdout.readline())
        with python("print('asks', flush=True)\nwith files.cache_lock('build'): print('has it')") as second:
            assert second.stdout.readline() == "asks\n"
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(0.3)
            first.kill()
            try:
                second.wait(20)
                assert second.stdout.read() == "has it\n"
            finally:
                os.kill(child, signal.SIGKILL)


def test_where_files_cannot_be_locked_it_says_so(own_cache, monkeypatch):
    import fcntl

    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with (
        pytest.warns(RuntimeWarning, match="build.lock cannot be locked, .* all build the same: .*No locks available"),
        files.cache_lock("build"),
    ):
        assert files.write_cached("a.so", b"code").exists()


@pytest.mark.parametrize(("uid_map", "expected"), [("0 0 4294967295\n", None), ("1000 1000 1\n", 65534)])
def test_root_is_unmapped_where_no_user_is_root(uid_map, expected, tmp_path, monkeypatch):
    for name, text in (("UID_MAP", uid_map), ("OVERFLOW_UID", "65534\n")):
        monkeypatch.setattr(files, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    assert files._unmapped_root() == expected


def test_a_relative_folder_of_the_user_is_ignored_and_an_empty_home_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv("NSA_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert files.cache_dir() == tmp_path / ".cache" / "nsa-ascend"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert files.cache_dir() == tmp_path / "there" / "nsa-ascend"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "")
    with pytest.warns(RuntimeWarning, match=f"{ALONE}: HOME is empty"):
        assert files.writable_cache_dir() != Path("/.cache/nsa-ascend")
