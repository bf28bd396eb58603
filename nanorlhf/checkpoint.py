"""Run folders and everything a run needs to go on. Nothing is ever half-written.

    out/config.json  metrics.csv  samples.jsonl  curves.png  model/ (a Hugging Face folder)
    state/step-000020/ (resuming)

A folder is written under a temporary name, fsynced, and renamed into place; state carries the sha256 of its
file, since neither torch.load nor safetensors notices a flipped bit. All randomness is derived from (seed,
step), so that weights, optimizer and step are the whole state of a run.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import threading

import torch

from nanorlhf.common import Interrupted, Log, RunError, UserError

KEEP = 2  # complete checkpoints kept in state/


def write_folder(folder, files):
    """Write {name: bytes} as one folder, all or nothing. RunError (old folder intact, nothing left over) if
    the disk is full."""
    tmp, old = f"{folder}.tmp", f"{folder}.old"
    try:
        for leftover in (tmp, old):
            shutil.rmtree(leftover, ignore_errors=True)
        os.makedirs(tmp)
        for name, data in files.items():
            with open(os.path.join(tmp, name), "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        if os.path.isdir(folder):
            os.rename(folder, old)
        os.rename(tmp, folder)
        shutil.rmtree(old, ignore_errors=True)
        if hasattr(os, "O_DIRECTORY"):  # make the rename itself durable
            fd = os.open(os.path.dirname(os.path.abspath(folder)), os.O_DIRECTORY)
            os.fsync(fd)
            os.close(fd)
    except OSError as e:
        shutil.rmtree(tmp, ignore_errors=True)
        if os.path.isdir(old) and not os.path.isdir(folder):
            os.rename(old, folder)
        size = sum(map(len, files.values()))
        raise RunError(
            f"cannot save {folder} ({size:,} bytes): {e.strerror}; the last complete checkpoint is kept"
        ) from e


class Run:
    """The run folder of one trainer: opened, logged to, saved and resumed in the same way by all of them.

        with Run(cfg, COLUMNS, SHOW, PANELS) as run:
            start, extra = run.start({"model": model}, optimizer)
            for step in range(start, cfg.steps):
                ...
                run.log.row(step, metrics)
                run.checkpoint(step + 1, lambda: hub.save(model, tok, f"{cfg.out}/model"))

    Raises UserError when the folder is a file or holds a run and neither --resume nor --overwrite was given.
    """

    def __init__(self, cfg, columns, show, panels):
        self.cfg, self.out, self.signum, self.handlers, self.log = cfg, cfg.out, None, {}, None
        self.columns, self.show, self.panels = columns, show, panels
        old = os.path.join(self.out, "config.json")
        config = dataclasses.asdict(cfg)
        try:
            os.makedirs(os.path.join(self.out, "state"), exist_ok=True)
            if os.path.exists(old):
                if cfg.resume:
                    self._compare(old, config)
                elif cfg.overwrite:
                    for name in ("model", "state"):
                        shutil.rmtree(os.path.join(self.out, name), ignore_errors=True)
                    os.makedirs(os.path.join(self.out, "state"))
                else:
                    raise UserError(
                        f"--out {self.out} holds a run: add --resume to go on with it, --overwrite to "
                        "replace it, or name another folder"
                    )
            with open(old + ".tmp", "w") as f:
                json.dump(config, f, indent=2)
            os.replace(old + ".tmp", old)
        except OSError as e:
            raise UserError(f"--out {self.out}: cannot be used as a run folder ({e.strerror})") from None

    @staticmethod
    def _compare(path, config):
        try:
            with open(path) as f:
                old = json.load(f)
        except ValueError:
            raise UserError(f"{path} is damaged: it is not JSON; --overwrite starts anew") from None
        for key in sorted(k for k in set(old) & set(config) if old[k] != config[k]):
            if key not in ("resume", "overwrite"):
                print(f"resume: --{key} was {old[key]}, is now {config[key]}")

    def start(self, models, optimizer):
        """Load the newest complete checkpoint if --resume, open the log → (first step to run, extra dict)."""
        self.models, self.optimizer = models, optimizer
        step, extra = self._load() if self.cfg.resume else (0, {})
        self.log = Log(
            self.out,
            self.columns,
            self.show,
            self.cfg.steps,
            step,
            self.cfg.wandb,
            dataclasses.asdict(self.cfg),
        )
        if (
            threading.current_thread() is threading.main_thread()
        ):  # a notebook's worker thread may not set handlers
            self.handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return step, extra

    def _stop(self, signum, frame):
        if self.signum is not None:  # the second time: at once
            raise KeyboardInterrupt
        self.signum = signum
        self.log.say("\nstopping after this step (once more to stop at once)")

    def _load(self):
        folder = os.path.join(self.out, "state")
        steps = sorted(
            (d for d in os.listdir(folder) if d.startswith("step-") and d[5:].isdigit()), reverse=True
        )
        for name in steps:
            path = os.path.join(folder, name, "state.pt")
            try:
                with open(os.path.join(folder, name, "manifest.json")) as f:
                    want = json.load(f)["sha256"]
                with open(path, "rb") as f:
                    data = f.read()
                if hashlib.sha256(data).hexdigest() != want:
                    raise ValueError("its checksum does not match")
                state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
            except (OSError, ValueError, KeyError) as e:
                print(f"resume: {path} is damaged ({e}); trying an older checkpoint")
                continue
            for key, model in self.models.items():
                self._fit(model, state["models"].get(key), path, key)
            self.optimizer.load_state_dict(state["optimizer"])
            print(f"resume: {self.out} from step {state['step']}")
            return state["step"], state["extra"]
        print(f"resume: {self.out} has no complete checkpoint yet; starting at step 0")
        return 0, {}

    @staticmethod
    def _fit(model, saved, path, key):
        mine = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        theirs = {k: tuple(v.shape) for k, v in (saved or {}).items()}
        wrong = sorted(k for k in set(mine) | set(theirs) if mine.get(k) != theirs.get(k))
        if wrong:
            k = wrong[0]
            raise UserError(
                f"--resume: {path} does not fit this {key}: {k} is {theirs.get(k)} there and {mine.get(k)} "
                f"here ({len(wrong)} tensors differ); resume with the flags in config.json"
            )
        model.load_state_dict(saved)

    def save(self, step, extra=None):
        """State after `step` steps. RunError if it cannot be written; the older checkpoints stay."""
        state = {"step": step, "models": {k: m.state_dict() for k, m in self.models.items()},
                 "optimizer": self.optimizer.state_dict(), "extra": extra or {}}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        manifest = json.dumps(
            {"step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        ).encode()
        folder = os.path.join(self.out, "state")
        write_folder(os.path.join(folder, f"step-{step:06d}"), {"state.pt": data, "manifest.json": manifest})
        for old in sorted(d for d in os.listdir(folder) if d.startswith("step-"))[:-KEEP]:
            shutil.rmtree(os.path.join(folder, old), ignore_errors=True)

    def checkpoint(self, done, export, extra=None):
        """After each step: save when due, at the end and when asked to stop. `export` writes model/. True:
        stop now.

        done: steps finished so far.
        """
        last = done == self.cfg.steps
        if last or self.signum is not None or (self.cfg.save_every and done % self.cfg.save_every == 0):
            self.save(done, extra)
            export()
        if self.signum is not None and not last:
            raise Interrupted(self.signum)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if self.log is not None:
            self.log.close(self.panels if kind is None or kind is Interrupted else ())

    def check(self, step, loss, gnorm, where):
        """Stop before the optimizer step if loss or gradient is not finite, so that weights and moments stay
        as they are."""
        if not (torch.isfinite(torch.as_tensor(loss)) and torch.isfinite(torch.as_tensor(gnorm))):
            raise RunError(
                f"step {step}: loss {float(loss):g}, gradient norm {float(gnorm):g} ({where}); the weights are "
                "untouched. Look at the end of metrics.csv (gnorm, kl, ratio_max); most often --lr is "
                "too high. --resume goes on from the last checkpoint"
            )
