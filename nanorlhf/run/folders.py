"""Folders that are never half-written: made under a temporary name, synced, renamed, checked by checksums."""

import contextlib
import hashlib
import json
import os
import shutil

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
    """`with new_folder(f) as tmp:` write files into tmp, which is then put in the place of f, all or nothing.

    manifest: leave manifest.json there, the size and sha256 of every file. size: bytes, for the message.
    RunError if the disk is full or fails; the old folder stays then, and after a crash `restore` finds it.
    """
    tmp, old = f"{folder}.tmp", f"{folder}.old"
    try:
        restore(folder)
        for leftover in (tmp, old):
            shutil.rmtree(leftover, ignore_errors=True)
        os.makedirs(tmp)
        yield tmp
        if manifest:
            with open(os.path.join(tmp, MANIFEST), "w") as f:
                json.dump({"files": dict(describe(tmp))}, f, separators=(",", ":"))
        for path in _paths(tmp):
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        for where, _, _ in os.walk(tmp):
            sync_folder(where)
        if os.path.isdir(folder):
            os.rename(folder, old)
        os.rename(tmp, folder)
        shutil.rmtree(old, ignore_errors=True)
        sync_folder(os.path.dirname(os.path.abspath(folder)))  # makes the rename itself durable
    except (OSError, SafetensorError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "inline_container" not in str(e):  # torch.save's word for the disk
            raise
        shutil.rmtree(tmp, ignore_errors=True)
        restore(folder)
        cause = e if isinstance(e, OSError) else e.__context__
        why = getattr(cause, "strerror", None) or str(e).splitlines()[0]
        kept = "complete checkpoints are kept"
        raise RunError(f"cannot save {folder} ({size:,} bytes): {why}; {kept}") from e


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


def restore(folder):
    """After a crash between the two renames of `new_folder` there is only the old one: put it back."""
    if os.path.isdir(f"{folder}.old") and not os.path.isdir(folder):
        os.rename(f"{folder}.old", folder)


def _paths(folder):
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)


def sync_folder(folder):
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        fd = os.open(folder, os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)


def describe(folder):
    """Pairs (name, {"bytes", "sha256"}) of every file in a folder but its manifest."""
    for path in _paths(folder):
        name = os.path.relpath(path, folder).replace(os.sep, "/")
        if name != MANIFEST:
            digest = hashlib.sha256()
            with open(path, "rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
            yield name, {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def verify(folder):
    """ValueError, naming the file, unless a folder is what its manifest says, byte for byte."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as f:
            want = dict(json.load(f)["files"])
        want = {name: (x["bytes"], x["sha256"]) for name, x in want.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: no list of checksums ({type(e).__name__}: {e})") from None
    have = {name: (x["bytes"], x["sha256"]) for name, x in describe(folder)}
    for name in sorted(want):
        found = "missing" if name not in have else f"of {have[name][0]} bytes"
        if have.get(name) != want[name]:
            why = f"it is {found}, the manifest says {want[name][0]} bytes of another content"
            raise ValueError(f"{os.path.join(folder, name)}: wrong checksum ({why})")


def take_lock(folder):
    """→ the open file folder/lock, which holds this process's number. UserError while another has it.

    The operating system lets go of it when a process ends, however it ends: a dead one is in nobody's way.
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
            who = f.read().strip() or "unknown"
            f.close()
            what = "wait for it, stop it, or name another folder"
            raise UserError(f"--out {folder} is in use by another process (pid {who}): {what}") from None
        except OSError as e:  # a network file system that has no locks
            print(f"warning: {path}: cannot be locked ({e.strerror}); let no second run use this folder")
        with contextlib.suppress(FileNotFoundError):  # who held it before may just have removed it
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                break
        f.close()
    f.truncate(0)
    f.write(str(os.getpid()))
    f.flush()
    return f


def tensor_bytes(x):
    """Bytes of all the tensors in nested dicts and lists."""
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return sum(map(tensor_bytes, parts))
