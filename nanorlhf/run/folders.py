"""Folders that are never half-written: made under a temporary name, synced, renamed, checked by checksums."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

from nanorlhf.errors import RunError, UserError, blame, reason_of, require

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None


MANIFEST = "manifest.json"


@contextlib.contextmanager
def new_folder(folder, manifest=False):
    """`with new_folder(f) as tmp:` write files into tmp, which then replaces f, all or nothing.

    manifest: write manifest.json as well, with the size and sha256 of every file. RunError if the disk is
    full or fails: the old folder is kept. After a crash `restore` finds it.
    """
    tmp = f"{folder}.tmp"
    try:
        restore(folder)
        remove(tmp)
        remove(f"{folder}.old")
        os.makedirs(tmp)
        yield tmp
        if manifest:
            with open(os.path.join(tmp, MANIFEST), "w") as f:
                json.dump({"files": describe(tmp)}, f, separators=(",", ":"))
        _put_in_place(tmp, folder)
    except (OSError, RuntimeError) as e:
        disk = "inline_container" in str(e)  # as torch.save calls it
        if isinstance(e, RuntimeError) and not disk:
            raise
        shutil.rmtree(tmp, ignore_errors=True)
        restore(folder)
        cause = e if isinstance(e, OSError) else e.__context__
        reason = getattr(cause, "strerror", None) or reason_of(e)
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(folder))).free
        message = f"cannot save {folder} ({free:,} bytes are free): {reason}; complete checkpoints are kept"
        raise RunError(message) from e


def _put_in_place(tmp, folder):
    """Rename tmp to folder, once all of its bytes are on the disk: a power cut leaves the old or the new."""
    for path in _files(tmp):
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
    for parent, _, _ in os.walk(tmp):
        sync_folder(parent)
    old = f"{folder}.old"
    if os.path.lexists(folder):
        os.rename(folder, old)
    os.rename(tmp, folder)
    remove(old)
    sync_folder(os.path.dirname(os.path.abspath(folder)))  # or a power cut may undo the renames


def restore(folder):
    """Put the old folder back after a crash between the two renames of `new_folder`."""
    if os.path.isdir(f"{folder}.old") and not os.path.isdir(folder):
        os.rename(f"{folder}.old", folder)


def write_json(path, content):
    """Write a JSON file under a temporary name, and rename it: there is the old file or the whole new one."""
    tmp = f"{path}.tmp"
    with open(tmp, "w") as f:
        json.dump(content, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
    sync_folder(os.path.dirname(path))  # or a power cut could lose the new name, and those of other files


def require_plain(folder):
    """UserError if anything in a run folder, or in its checkpoints, is a link, a pipe or a device.

    A link that was planted there, config.json.tmp → ~/.bashrc say, would make the run overwrite that file. A
    pipe that nobody reads would make it wait for ever. The run folder itself may be a link.
    """
    for path in [*Path(folder).iterdir(), *Path(folder, "state").rglob("*")]:
        mode = path.lstat().st_mode
        plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        problem = f"{path} is a link, a pipe or a device; remove it, or name another folder"
        require(plain, f"--out {folder}: {problem}")


def remove(path):
    """Remove a folder with all that is in it, or a file in its place; nothing where there is neither."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def sync_folder(folder):
    """Make the names in a folder outlast a power cut, as fsync does for the contents of a file."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        fd = os.open(folder, os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)


def _files(folder):
    """Paths of all files below a folder, sorted."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def describe(folder):
    """{name: {"bytes", "sha256"}} of every file below a folder but its manifest."""
    found = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            found[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return found


def sha256(path):
    """The sha256 of a file, in hexadecimal. The file may be larger than the memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def verify(folder):
    """UserError, naming the file, unless every file is the one that the manifest lists, byte for byte."""
    path = Path(folder, MANIFEST)
    with blame(f"{path}: no list of checksums", OSError, ValueError, LookupError, TypeError, RecursionError):
        listed = dict(json.loads(path.read_text("utf-8"))["files"])
    found = describe(folder)
    for name in sorted(listed):
        same = found.get(name) == listed[name]
        require(same, f"{os.path.join(folder, name)}: wrong checksum, or missing")


def read_rows(out):
    """metrics.csv of a run folder → one dict a step, without the lines that a full disk cut short."""
    path = Path(out, "metrics.csv")
    require(path.is_file(), f"{path}: is no file")  # of a pipe or a device the end never comes
    rows = []
    with open(path, encoding="utf-8", errors="replace") as f:
        columns = f.readline().rstrip("\n").split(",")
        for line in f:
            cells = line.rstrip("\n").split(",")
            with contextlib.suppress(ValueError):  # a damaged line
                numbers = [float(cell) if cell else None for cell in cells]
                rows.append(dict(zip(columns, numbers, strict=True)) | {"step": int(cells[0])})
    return rows


def take_lock(folder):
    """Lock a run folder → its file descriptor, to be closed. None where folders cannot be locked.

    UserError while another process has the lock. The operating system frees it when its process ends, even by
    kill -9: a dead run blocks nobody.
    """
    if fcntl is None:
        return None
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        hint = "wait for it, stop it, or name another folder"
        raise UserError(f"--out {folder} is in use by another process: {hint}") from None
    except OSError as e:  # a network file system that has no locks
        print(f"warning: {folder}: cannot be locked ({e.strerror}); let no second run use this folder")
    return fd
