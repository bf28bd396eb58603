"""Run folders and everything a run needs to go on. Nothing is ever half-written.

    out/config.json  metrics.csv  samples.jsonl  curves.png  model/ (a Hugging Face folder)
    state/step-000020/ (resuming)

A folder is written under a temporary name, fsynced, and renamed into place; state carries the sha256 of its
file, since neither torch.load nor safetensors notices a flipped bit. All randomness is derived from (seed,
step), so that weights, optimizer and step are the whole state of a run.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import signal
import threading

import torch

from nanorlhf.common import Interrupted, Log, RunError, UserError, import_wandb, require

KEEP = 2  # complete checkpoints kept in state/


def write_folder(folder, files):
    """Write {name: bytes} as one folder, all or nothing. Disk full: RunError, and the old folder stays."""
    tmp, old = f"{folder}.tmp", f"{folder}.old"
    try:
        restore(folder)
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
        restore(folder)
        size = sum(map(len, files.values()))
        kept = "the last complete checkpoint is kept"
        raise RunError(f"cannot save {folder} ({size:,} bytes): {e.strerror}; {kept}") from e


def restore(folder):
    """After a crash between the two renames of `write_folder` there is only the old one: put it back."""
    if os.path.isdir(f"{folder}.old") and not os.path.isdir(folder):
        os.rename(f"{folder}.old", folder)


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
        self.config, self.state = os.path.join(self.out, "config.json"), os.path.join(self.out, "state")
        import_wandb(cfg.wandb)  # if it is missing, say so before anything is touched
        require(not (cfg.resume and cfg.overwrite), "--resume and --overwrite: give one of the two")
        with self._usable():
            os.makedirs(self.out, exist_ok=True)
            holds_run = os.path.exists(self.config)
        if holds_run and not (cfg.resume or cfg.overwrite):
            raise UserError(f"--out {self.out} holds a run: add --resume to go on with it, --overwrite to "
                            "replace it, or name another folder")

    @contextlib.contextmanager
    def _usable(self):
        try:
            yield
        except OSError as e:
            raise UserError(f"--out {self.out}: cannot be used as a run folder ({e.strerror})") from None

    def start(self, models, optimizer, frozen=()):
        """Load the newest complete checkpoint if --resume, open the log → (first step to run, extra dict).

        frozen: models that the run only reads and that must be the same ones when it is resumed.
        Until here nothing of an older run was touched: whatever was wrong with flags or data has been said.
        """
        self.models, self.optimizer = models, optimizer
        self.frozen = [sum(p.double().sum().item() for p in model.parameters()) for model in frozen]
        config = dataclasses.asdict(self.cfg)
        with self._usable():
            if self.cfg.resume:
                self._compare(config)
            elif self.cfg.overwrite:
                for name in ("model", "state"):
                    shutil.rmtree(os.path.join(self.out, name), ignore_errors=True)
            os.makedirs(self.state, exist_ok=True)
            step, extra = self._load() if self.cfg.resume else (0, {})
            self.log = Log(self.out, self.columns, self.show, self.cfg.steps, step, self.cfg.wandb, config)
            with open(self.config + ".tmp", "w") as f:
                json.dump(config, f, indent=2)
            os.replace(self.config + ".tmp", self.config)
        if threading.current_thread() is threading.main_thread():  # elsewhere handlers may not be set
            self.handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return step, extra

    def _compare(self, config):
        if not os.path.exists(self.config):
            return
        try:
            with open(self.config) as f:
                old = json.load(f)
        except ValueError:
            raise UserError(f"{self.config} is damaged: it is not JSON; --overwrite starts anew") from None
        if not isinstance(old, dict):
            raise UserError(f"{self.config} is damaged: it is no JSON object; --overwrite starts anew")
        for key in sorted(k for k in set(old) & set(config) if old[k] != config[k]):
            if key not in ("resume", "overwrite"):
                print(f"resume: --{key} was {old[key]}, is now {config[key]}")

    def _stop(self, signum, frame):
        if self.signum is not None:  # the second time: at once
            raise KeyboardInterrupt
        self.signum = signum
        self.log.say("\nstopping after this step (once more to stop at once)")

    def _load(self):
        steps = self._checkpoints()
        for name in reversed(steps):
            path = os.path.join(self.state, name, "state.pt")
            try:
                with open(os.path.join(self.state, name, "manifest.json")) as f:
                    want = json.load(f)["sha256"]
                with open(path, "rb") as f:
                    data = f.read()
                if hashlib.sha256(data).hexdigest() != want:
                    raise ValueError("its checksum does not match")
                state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
            except (OSError, ValueError, KeyError) as e:
                print(f"resume: {path} is damaged ({e})")
                continue
            for key, model in self.models.items():
                self._fit(model, state["models"].get(key), path, key)
            if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(state["frozen"], self.frozen)):
                raise UserError(f"--resume: the reference is not the one that {self.out} was started with")
            hyper = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, mine in zip(self.optimizer.param_groups, hyper):
                group.update(mine)  # moments come from the checkpoint, --lr and --weight_decay from this run
            print(f"resume: {self.out} from step {state['step']}")
            return state["step"], state["extra"]
        if steps:
            raise UserError(f"--resume: every checkpoint in {self.state} is damaged; --overwrite starts anew")
        print(f"resume: {self.out} has no complete checkpoint yet; starting at step 0")
        return 0, {}

    def _checkpoints(self):
        names = (d for d in os.listdir(self.state) if d.startswith("step-") and d[5:].isdigit())
        return sorted(names, key=lambda d: int(d[5:]))

    @staticmethod
    def _fit(model, saved, path, key):
        mine = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        theirs = {k: tuple(v.shape) for k, v in (saved or {}).items()}
        wrong = sorted(k for k in set(mine) | set(theirs) if mine.get(k) != theirs.get(k))
        if wrong:
            k = wrong[0]
            shapes = f"{k} is {theirs.get(k)} there and {mine.get(k)} here ({len(wrong)} tensors differ)"
            hint = "resume with the flags in config.json"
            raise UserError(f"--resume: {path} does not fit this {key}: {shapes}; {hint}")
        model.load_state_dict(saved)

    def save(self, step, extra=None):
        """State after `step` steps. RunError if it cannot be written; the older checkpoints stay."""
        state = {"step": step, "models": {k: m.state_dict() for k, m in self.models.items()},
                 "optimizer": self.optimizer.state_dict(), "extra": extra or {}, "frozen": self.frozen}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        manifest = {"step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files = {"state.pt": data, "manifest.json": json.dumps(manifest).encode()}
        write_folder(os.path.join(self.state, f"step-{step:06d}"), files)
        for old in self._checkpoints()[:-KEEP]:
            shutil.rmtree(os.path.join(self.state, old), ignore_errors=True)

    def checkpoint(self, done, export, extra=None):
        """After each step: save when due, at the end and when asked to stop (then raise Interrupted).

        done: steps finished so far; export: writes model/.
        """
        last = done == self.cfg.steps
        if last or self.signum is not None or (self.cfg.save_every and done % self.cfg.save_every == 0):
            for name, model in self.models.items():
                if not all(p.isfinite().all() for p in model.parameters()):
                    raise RunError(f"step {done - 1} left weights of the {name} not finite; lower --lr")
            export()  # first: were it lost after the state of the last step, no --resume would make it again
            self.save(done, extra)
        if self.signum is not None:
            raise Interrupted(self.signum)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if self.log is not None:
            self.log.close(self.panels if kind is None or kind is Interrupted else ())
        if kind is None:
            print(f"written: {self.out}/model, metrics.csv, samples.jsonl, curves.png")

    def check(self, step, loss, gnorm, where):
        """Stop before the optimizer step if loss or gradient is not finite: nothing is spoilt yet."""
        if not (math.isfinite(loss) and math.isfinite(gnorm)):
            look = "look at the end of metrics.csv (gnorm, kl, ratio_max); most often --lr is too high"
            kept = "--resume goes on from the last checkpoint" if self._checkpoints() else "no checkpoint yet"
            found = f"step {step}: loss {loss:g}, gradient norm {gnorm:g} ({where})"
            raise RunError(f"{found}; this update was not made; {look}; {kept}")
