"""Files that are never half-written, and the cache of compiled code: where it is and whose files it takes."""

import atexit
import os
import shutil
import stat
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

UID_MAP = Path("/proc/self/uid_map")  # a line for each range of users: the first here, the first outside, how many
OVERFLOW_UID = Path("/proc/sys/fs/overflowuid")  # of users that are not mapped


def write_aside(path, content, mode=0o666):
    """Write a file, text or bytes, as a whole or not at all, even if the machine loses its power; its folder is made if
    need be. `mode` is what a new file may be at most: the umask takes away from it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)) / path.name  # nobody else's
    try:
        with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else the new name may reach the disk before the content does
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
        aside.parent.rmdir()


def why_refused(path):
    """Why nothing is to be loaded from `path`, a file or a folder, as a clause; None where it can be trusted.

    Trusted is what no other user can change: root or the user who runs this owns it and every folder above it, and
    nobody else may write to them. A folder further up may be open to all if it has the sticky bit, as /tmp has, since
    there nobody can rename another's folder. Raises OSError where there is nothing at `path`.
    """
    path = Path(path).resolve(strict=True)
    folder = path if path.is_dir() else path.parent
    for part in (path, *path.parents):
        status, above = part.stat(), part not in (path, folder)
        if status.st_uid not in (0, os.geteuid()) and not (above and status.st_uid == _unmapped_root()):
            return f"{part} belongs to another user, number {status.st_uid}"
        by_others = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_alone(status))
        if by_others and not (above and status.st_mode & stat.S_ISVTX):
            return f"others than its owner may write to {part} (chmod go-w)"
    return None


def _is_alone(status):
    """Whether the owner's group is the owner's alone, as where every user has a group of the same name. There the umask
    is often 002, which lets the group write to all folders that programs make, ~/.cache among them."""
    import grp  # not on Windows
    import pwd

    try:
        owner, group = pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid)
    except KeyError:  # numbers without a name, as in some containers
        return False
    with_this_group = {user.pw_name for user in pwd.getpwall() if user.pw_gid == status.st_gid}
    # root's group is the one that containers of some platforms give every user
    return group.gr_name == owner != "root" and {*group.gr_mem, *with_this_group} <= {owner}


def _unmapped_root():
    """The number that root's folders bear in a container whose users have no root among them; else None."""
    try:
        mapped = [line.split()[0] for line in UID_MAP.read_text().splitlines()]
        return None if "0" in mapped else int(OVERFLOW_UID.read_text())
    except OSError:  # no Linux
        return None


def cache_dir():
    """Where compiled code is kept: NSA_CACHE_DIR, or nsa-ascend in the user's cache folder. It need not exist.
    RuntimeError for a user without a home."""
    chosen = os.environ.get("NSA_CACHE_DIR")
    users = os.environ.get("XDG_CACHE_HOME", "")
    if not users.startswith(("/", "~")):  # a relative one is to be ignored, says its specification
        users = "~/.cache"
    folder = Path(chosen or f"{users}/nsa-ascend")
    if folder.parts[:1] == ("~",) and os.environ.get("HOME") == "":
        raise RuntimeError("HOME is empty")
    return folder.expanduser().absolute()


def writable_cache_dir():
    """`cache_dir()`, made with mode 0700 if need be. Where it cannot be written or trusted: a folder for this process
    alone, removed when the process ends, and a warning that says why."""
    try:
        folder = cache_dir().resolve()
        make_private(folder)
        reason = why_refused(folder)
        if reason is None and os.access(folder, os.W_OK | os.X_OK):
            return folder
        return _temporary_dir(reason or f"{folder} cannot be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        return _temporary_dir(error)


def cached_files(pattern):
    """Paths of the kept files whose names match, newest first: those in `cache_dir()`, which may be read-only, then
    those of this process alone. What cannot be trusted is left out, with a warning that says why."""
    try:
        folder = cache_dir().resolve()
        reason = why_refused(folder) if folder.exists() else None
    except (OSError, RuntimeError) as error:
        reason = error
    if reason is not None:
        folder = _temporary_dir(reason)
    for each in dict.fromkeys([folder, _temporary_dirs.get(os.getpid(), folder)]):
        paths = [path.resolve() for path in each.glob(pattern) if path.is_file()]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            reason = why_refused(path)
            if reason is None:
                yield path
            else:
                warnings.warn(f"{path} is not used: {reason}", RuntimeWarning, stacklevel=2)


def write_cached(name, content):
    """Keep text or bytes under `name`, such as "cpu-1234.so" or "12/1234.json.gz"; the path. Only the user may write to
    the file. Where the disk is full it goes to this process's own folder, with a warning."""
    folder = writable_cache_dir()
    try:
        return write_private(folder / name, content)
    except OSError as error:
        return write_private(_temporary_dir(error) / name, content)


@contextmanager
def cache_lock(name):
    """Holds off all other processes that use the cache and this name; threads of one process it does not hold off.

    The kernel takes the lock back when its holder dies, and a forked child has no part in it. Where the file system has
    no locks, as some NFS has none, a warning says that processes which start together all do the same work: the last
    one's file stays, and each file is whole.
    """
    import fcntl  # not on Windows, where the rest of this module can be imported

    path = writable_cache_dir() / f"{name}.lock"
    lock = None
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.lockf(lock, fcntl.LOCK_EX)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be locked, so that processes that start together all build the same: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def make_private(folder):
    """Make a folder, and what is missing above it, so that only the user can enter them."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def write_private(path, content, mode=0o644):
    """`write_aside` in a folder that, where it is not there yet, only the user can enter; the path."""
    make_private(path.parent)
    write_aside(path, content, mode)
    return path


_temporary_dirs = {}  # {process: folder}; a forked child makes its own


def _temporary_dir(reason):
    process = os.getpid()
    if process in _temporary_dirs:
        return _temporary_dirs[process]
    folder = _temporary_dirs[process] = Path(tempfile.mkdtemp(prefix="nsa-ascend-")).resolve()

    def remove():
        if os.getpid() == process:  # a forked child may end before its parent
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    warnings.warn(
        f"compiled code is kept for this process alone, in {folder}: {reason}. Let NSA_CACHE_DIR name a folder that "
        "only you can write to",
        RuntimeWarning,
        stacklevel=4,
    )
    return folder
