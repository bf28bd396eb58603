"""Hostile model folders, by the thousand: each is loaded, sampled from and saved in a process of its own.

    python -m tests.faults.folders                            500 of them
    python -m tests.faults.folders --cases 20000 --seed 1     a night's worth

A case is a good folder of some family with one to three changes: a value in one of its JSON files, an entry
in the header of its weights, a number in a tensor, or a file that became a pipe, a folder, a link to a
device. The process may use 5 seconds and 2 GB beyond what Python and torch take. It must end well, or with
one line of at most 500 characters, and no file outside the folder that it saves to may change. A case that
fails is printed with its number, by which `--only N` makes it again.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import traceback
from pathlib import Path

import torch

from nanorlhf import hub
from nanorlhf.errors import RunError, UserError
from nanorlhf.generate import generate
from nanorlhf.model import GPT, ScalarModel
from nanorlhf.tokenizer import Chat, Tokenizer
from tests.faults import gguf_files

SECONDS = 5
BYTES = 2 << 30
GOLDEN = Path(__file__).parents[1] / "golden"
DEEP = "[" * 100_000 + "]" * 100_000
ODD = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**31 - 1, 2**53, 2**63, 10**400, -(2**70), 1.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", "x", "1", "\0", "\ud800", "\x1b[2J", "a" * 5000, "../../x",
    "/dev/zero", [], {}, [[]], [1, 2], [None], {"a": 1}, "DEEP",
]  # fmt: skip
TEMPLATES = [
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ messages[9].content }}", "{% if %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('\x1b[31mno') }}",
    "{{ 10**10**10 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ ''.__class__ }}",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", "{{ 'a'.join(['b'] * 10**9) }}", "",
    "{{ [0] * 10**10 }}", "{{ '%0999999999d' % 1 }}", "{{ 'a'.ljust(10**10) }}", "{% include 'x' %}",
    "{{ '{:999999999}'.format(1) }}", "{{ strftime_now('%Y' * 9999999) }}",
    "{{ cycler.__init__.__globals__ }}",
]  # fmt: skip
PATTERNS = [r"(a+)+$", r"(\w+\s?)*$", "(", r"\p{Nonsense}", "(?R)", r"(x*)*", r"(?<=a{1,99999})b", ""]


# ------------------------------------------------------------------------------------------------------------
# good folders


def larger(golden):
    """A model like a golden one, which has 29 ids and 12 positions, but with room for the tokenizers."""
    model = GPT(dataclasses.replace(golden.cfg, vocab_size=400, max_len=64))
    return ScalarModel(model) if isinstance(golden, ScalarModel) else model


def good_folders(folder):
    """A small folder of each family and each kind of tokenizer, below `folder` → their paths."""
    specs = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))
    kinds = [kind for kind in specs if isinstance(specs[kind], dict) and "spec" in specs[kind]]
    made = []
    for source in sorted(path for path in GOLDEN.iterdir() if (path / "config.json").exists()):
        for kind in [*kinds, "bytes", "chars"]:
            model = larger(hub.load(source)[0])
            target = folder / f"{source.name}-{kind}"
            tok = None
            if kind == "bytes":
                tok = Tokenizer.from_bytes()
            elif kind == "chars":
                tok = Tokenizer.from_chars("abc=")
            hub.save(model, tok, target)
            if tok is None:
                names = {"eos_token": specs[kind]["eos"], "chat_template": TEMPLATES[9]}
                (target / "tokenizer.json").write_text(json.dumps(specs[kind]["spec"]), "utf-8")
                (target / "tokenizer_config.json").write_text(json.dumps(names))
            made.append(target)
    return made + gguf_files.good_files(made)


# ------------------------------------------------------------------------------------------------------------
# changes


def change(rng, folder):
    """One change to a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    if not files:
        return
    path = rng.choice(files)
    kind = rng.choice(["inside", "inside", "inside", "inside", "bytes", "special"])
    if kind == "special":
        _special(rng, path)
    elif path.suffix == ".gguf":
        gguf_files.bend(rng, path, ODD)
    elif kind == "bytes" or path.suffix not in (".json", ".safetensors"):
        _bytes(rng, path)
    elif path.suffix == ".json":
        _json(rng, path)
    else:
        _weights(rng, path)


def _special(rng, path):
    """The file becomes something that is no regular file, or is gone."""
    path.unlink()
    kind = rng.choice(["gone", "pipe", "folder", "itself", "device", "endless", "nowhere"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "itself":
        path.symlink_to(path.name)
    elif kind in ("device", "endless", "nowhere"):
        path.symlink_to({"device": "/dev/null", "endless": "/dev/zero", "nowhere": "/nowhere"}[kind])


def _bytes(rng, path):
    """Some bytes flipped, cut out, put in, or all behind a place left out."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) + 1)
    kind = rng.choice(["flip", "cut", "put", "end"])
    if kind == "flip" and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at : at + rng.randint(1, 9)]
    elif kind == "put":
        data[at:at] = rng.choice([b"\0", b"\xff", b"{", b'"', b"[", b"1e9", b"\xed\xa0\x80", b"NaN"])
    else:
        del data[at:]
    path.write_bytes(data)


def _json(rng, path):
    """One value somewhere in a JSON file exchanged, left out or put in."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):  # an earlier change damaged it
        return _bytes(rng, path)
    value = _bent(rng, value, path.name)
    text = json.dumps(value).replace('"DEEP"', DEEP)
    path.write_text(text, "utf-8")


def _bent(rng, value, name=""):
    """A parsed JSON value with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if key == "chat_template" and kind < 0.8:
            return value | {key: rng.choice(TEMPLATES)}
        if key == "Regex" and kind < 0.8:
            return value | {key: rng.choice(PATTERNS)}
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {rng.choice([*value, "reward_bias", "step_ids", "eos_token_id"]): rng.choice(ODD)}
        return value | {key: _bent(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            return value[:at] + value[at + 1 :]
        if kind < 0.3:
            return [*value, value[at]]
        return [*value[:at], _bent(rng, value[at]), *value[at + 1 :]]
    if type(value) in (int, float) and abs(value) < 1e300 and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, value * 2, value * 1000, -value, value + 0.5])
    return rng.choice(ODD)


def _weights(rng, path):
    """A change in the header of a safetensors file, or in its numbers."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        if not isinstance(header, dict) or len(header) < 2:
            raise ValueError("no header")
    except (ValueError, RecursionError):  # an earlier change damaged it
        return _bytes(rng, path)
    body = bytearray(data[8 + size :])
    kind = rng.random()
    if kind < 0.25 and len(body) >= 4:
        at = rng.randrange(0, len(body) - 3, 4)
        odd = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"]  # NaN, inf, 3e38 in fp32
        body[at : at + 4] = rng.choice(odd)
        header.pop("__metadata__", None)  # with the checksum
    elif kind < 0.5:
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        header[rng.choice(["x", name + ".0", "lm_head.weight", *names])] = header.pop(name)
    else:
        header = _bent(rng, header)
    text = json.dumps(header).replace('"DEEP"', DEEP).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


# ------------------------------------------------------------------------------------------------------------
# a case, in a process of its own


def use(folder, out):
    """What a user does with a model folder: load it, read a text and a chat, sample, save."""
    single = folder / "model.gguf"
    model, tok = hub.load(single if os.path.lexists(single) else folder)
    prompts = [[0, 1], [1]]
    if tok is not None:
        tok.decode(tok.encode("abc=" * 20))
        ids = tok.encode_prompt(Chat([{"role": "user", "content": "abc"}]))
        prompts = [ids[:8] or [0]]
    if hasattr(model, "scores"):
        model.logits(torch.tensor(prompts[:1]))
    else:
        generate(model, prompts, n=2, max_new_tokens=3, eos_id=0, seed=0)
    hub.save(model, tok, out)


def child(folder, out, pipe):
    """Run `use` under the limits and write its outcome into the pipe. Never returns."""
    with open("/proc/self/statm") as f:
        taken = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, taken + BYTES))
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 2)
    try:
        use(folder, out)
        said = "used"
    except (UserError, RunError) as e:
        said = f"refused {e}"
        if "\n" in str(e) or len(str(e)) > 500:
            said = f"no single short line {str(e)[:300]!r}"
        elif any(ord(letter) < 32 for letter in str(e)):
            said = f"control characters {str(e)!r}"
    except BaseException:
        said = f"traceback {traceback.format_exc()[-1500:]}"
    os.write(pipe, said.encode("utf-8", "replace")[:4000])
    os._exit(0)


def outcome(folder, out):
    """→ "used", "refused ...", or what went wrong."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(folder, out, send)
    os.close(send)
    said = ""
    if select.select([receive], [], [], SECONDS)[0]:
        said = os.read(receive, 4000).decode("utf-8", "replace")
    else:
        os.kill(pid, signal.SIGKILL)
        said = f"still busy after {SECONDS} s"
    os.close(receive)
    status = os.waitpid(pid, 0)[1]
    return said or f"died with status {status}"


def snapshot(folder):
    """{path: kind, size, digest or target} of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file():
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[path] = path.lstat().st_mode
    return found


def attack(goods, number, seed, room):
    """Make case `number` of a seed below the folder `room` and run it → its outcome."""
    rng = random.Random(f"{seed}:{number}")
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    folder = room / "model"
    shutil.copytree(rng.choice(goods), folder)
    for _ in range(rng.randint(1, 3)):
        change(rng, folder)
    before = snapshot(room)
    said = outcome(folder, room / "saved")
    after = snapshot(room)
    for path in before.keys() | after.keys():
        if "saved" not in path.parts and before.get(path) != after.get(path):
            return f"changed {path.relative_to(room)}"
    return said


def main(argv=None):
    """Run the cases, print those that failed and the numbers of each outcome → how many failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    numbers = range(args.cases) if args.only is None else [args.only]
    counts = {"used": 0, "refused": 0, "failed": 0}
    with tempfile.TemporaryDirectory() as folder:
        goods = good_folders(Path(folder))
        for number in numbers:
            said = attack(goods, number, args.seed, Path(folder) / "room")
            kind = said.split()[0]
            counts[kind if kind in counts else "failed"] += 1
            if kind not in counts or args.only is not None:
                print(f"case {number}: {said}", flush=True)
    print(counts)
    return counts["failed"]


if __name__ == "__main__":
    raise SystemExit(bool(main()))
