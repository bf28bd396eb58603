"""Folders that are never half-written: made under a temporary name, synced, renamed, checked by checksums."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from nanorlhf.errors import RunError, UserError

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None


MANIFEST = "manifest.json"


@contextlib.contextmanager
def new_folder(folder, manifest=False, size=0):
    """`with new_folder(f) as tmp:` write files into tmp, which then replaces f, all or nothing.

    manifest: write manifest.json as well, with the size and sha256 of every file. size: bytes, for the
    message. RunError if the disk is full or fails: the old folder is kept. After a crash `restore` finds it.
    """
    tmp = f"{folder}.tmp"
    try:
        restore(folder)
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(f"{folder}.old", ignore_errors=True)
        os.makedirs(tmp)
        yield tmp
        if manifest:
            with open(os.path.join(tmp, MANIFEST), "w") as f:
                json.dump({"files": describe(tmp)}, f, separators=(",", ":"))
        _put_in_place(tmp, folder)
    except (OSError, SafetensorError, RuntimeError) as e:
        disk = "inline_container" in str(e)  # as torch.save calls it
        if isinstance(e, RuntimeError) and not disk:
            raise
        shutil.rmtree(tmp, ignore_errors=True)
        restore(folder)
        cause = e if isinstance(e, OSError) else e.__context__
        reason = getattr(cause, "strerror", None) or str(e).splitlines()[0]
        kept = "complete checkpoints are kept"
        raise RunError(f"cannot save {folder} ({size:,} bytes): {reason}; {kept}") from e


def _put_in_place(tmp, folder):
    """Rename tmp to folder, once all of its bytes are on the disk: a power cut leaves the old or the new."""
    for path in _files(tmp):
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
    for parent, _, _ in os.walk(tmp):
        sync_folder(parent)
    old = f"{folder}.old"
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(tmp, folder)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(os.path.dirname(os.path.abspath(folder)))  # or a power cut may undo the renames


def restore(folder):
    """Put the old folder back after a crash between the two renames of `new_folder`."""
    if os.path.isdir(f"{folder}.old") and not os.path.isdir(folder):
        os.rename(f"{folder}.old", folder)


def write_folder(folder, files, size=0):
    """Write {name: bytes, or a function that writes to a path} as one folder, as `new_folder` does.

    size: bytes that the functions will write.
    """
    size += sum(len(data) for data in files.values() if not callable(data))
    with new_folder(folder, size=size) as tmp:
        for name, data in files.items():
            path = os.path.join(tmp, name)
            if callable(data):
                data(path)
                continue
            with open(path, "wb") as f:
                f.write(data)


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
        if name == MANIFEST:
            continue
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
        found[name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


def verify(folder):
    """ValueError, naming the file, unless every file is the one that the manifest lists, byte for byte."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as f:
            listed = dict(json.load(f)["files"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: no list of checksums ({type(e).__name__}: {e})") from None
    found = describe(folder)
    for name in sorted(listed):
        if found.get(name) != listed[name]:
            reason = f"it is {found.get(name, 'missing')}, the manifest says {listed[name]}"
            raise ValueError(f"{os.path.join(folder, name)}: wrong checksum ({reason})")


def take_lock(folder):
    """Lock a run folder → the open file folder/lock, which holds this process's number.

    UserError while another process has it. The operating system frees the lock when its process ends, even by
    kill -9: a dead run blocks nobody.
    """
    if fcntl is None:
        return None
    path = os.path.join(folder, "lock")
    while True:
        f = open(path, "a+")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            pid = f.read().strip() or "unknown"
            f.close()
            hint = "wait for it, stop it, or name another folder"
            raise UserError(f"--out {folder} is in use by another process (pid {pid}): {hint}") from None
        except OSError as e:  # a network file system that has no locks
            print(f"warning: {path}: cannot be locked ({e.strerror}); let no second run use this folder")
        with contextlib.suppress(FileNotFoundError):  # the run before may just have removed it
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                break
        f.close()
    f.truncate(0)
    f.write(str(os.getpid()))
    f.flush()
    return f


def tensor_bytes(x):
    """Bytes of all the tensors in nested dicts and lists."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list):
        return sum(map(tensor_bytes, x))
    return x.nbytes if isinstance(x, torch.Tensor) else 0
