"""Run folders and everything a run needs to go on. Nothing is ever half-written.

    out/config.json  metrics.csv  samples.jsonl  curves.png  model/ (a Hugging Face folder)
    state/step-000020/ (resuming)  lock (while a process is at work)

A folder is written under a temporary name, fsynced, and renamed into place; state carries the size and sha256
of each of its files, since neither torch.load nor safetensors notices a flipped bit. All randomness is
derived from (seed, step), so that weights, optimizer and step are the whole state of a run.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import shutil
import signal
import sys
import threading

import torch

from nanorlhf.errors import Interrupted, RunError, UserError, require
from nanorlhf.run import dist, replay, sharding
from nanorlhf.run.folders import new_folder, restore, sync_folder, take_lock, tensor_bytes, verify
from nanorlhf.run.log import Log, import_wandb


def damage(folder):
    """What is wrong with a checkpoint, or None."""
    path = os.path.join(folder, "state.pt")
    try:
        verify(folder)
        torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except ValueError as e:
        return str(e)
    except (OSError, RuntimeError, pickle.UnpicklingError) as e:
        return f"{path}: {str(e).splitlines()[0]}"


def trainer_of(cfg):
    """A Config's module, "train_ppo", also where that is the script which was started."""
    module = type(cfg).__mro__[-3].__module__  # of Config(Flags), whatever a lab has made of it
    script = getattr(sys.modules["__main__"], "__file__", None)
    return os.path.splitext(os.path.basename(script))[0] if module == "__main__" and script else module


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
        self.lock = None
        self.columns, self.show, self.panels = columns, show, panels
        self.config, self.state = os.path.join(self.out, "config.json"), os.path.join(self.out, "state")
        import_wandb(cfg.wandb)  # if it is missing, say so before anything is touched
        require(not (cfg.resume and cfg.overwrite), "--resume and --overwrite: give one of the two")

    def __enter__(self):
        with self._usable():
            os.makedirs(self.out, exist_ok=True)
            self.lock = take_lock(self.out) if dist.rank() == 0 else None
        if os.path.exists(self.config) and not (self.cfg.resume or self.cfg.overwrite):
            self._unlock()
            raise UserError(f"--out {self.out} holds a run: add --resume to go on with it, --overwrite to "
                            "replace it, or name another folder")
        return self

    def _unlock(self):
        if self.lock is not None:
            with contextlib.suppress(FileNotFoundError):  # somebody tidied up
                os.unlink(self.lock.name)
            self.lock.close()

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
        sums = [[sharding.full(p.detach().double().sum()).item() for p in m.parameters()] for m in frozen]
        self.frozen = [sum(x) for x in sums]
        config = dataclasses.asdict(self.cfg)
        first = dist.rank() == 0  # of several processes, the one that writes
        dist.wait()  # until all have looked whether --out holds a run
        with self._usable():
            if self.cfg.resume:
                self._compare(config)
            elif self.cfg.overwrite and first:
                for name in ("model", "state"):
                    shutil.rmtree(os.path.join(self.out, name), ignore_errors=True)
            os.makedirs(self.state, exist_ok=True)
            step, extra = self._load() if self.cfg.resume else (0, {})
            self.log = Log(self.out, self.columns, self.show, self.cfg.steps, step, self.cfg.wandb, config)
            if first:
                with open(self.config + ".tmp", "w") as f:
                    json.dump(config, f, indent=2)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(self.config + ".tmp", self.config)
                sync_folder(self.out)  # state/ and the logs, too, are only now sure to be found again
        if threading.current_thread() is threading.main_thread():  # elsewhere handlers may not be set
            self.handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return step, extra

    def _compare(self, config):
        """Say which flags differ from those in config.json, and keep that for `_fit`."""
        self.changed = ""
        if not os.path.exists(self.config):
            return
        try:
            with open(self.config, encoding="utf-8") as f:
                old = json.load(f)
        except ValueError:
            raise UserError(f"{self.config} is damaged: it is not JSON; --overwrite starts anew") from None
        if not isinstance(old, dict):
            raise UserError(f"{self.config} is damaged: it is no JSON object; --overwrite starts anew")
        same = {"resume", "overwrite"} | {k for k in config if old.get(k, config[k]) == config[k]}
        changed = [f"--{k} was {old[k]}, is now {config[k]}" for k in sorted(config.keys() - same)]
        for change in changed:
            print(f"resume: {change}")
        self.changed = "; ".join(changed)

    def _stop(self, signum, frame):
        if self.signum is not None:  # the second time: at once
            raise KeyboardInterrupt(128 + signum)
        self.signum = signum
        self.log.say("\nstopping after this step (once more to stop at once)")

    def _tidy(self):
        """Remove what a crash left half-written."""
        for name in sorted(os.listdir(self.state)):
            path, kind = os.path.splitext(os.path.join(self.state, name))
            if kind == ".old":
                restore(path)
            if kind == ".tmp":
                print(f"resume: {path} was never completed; removed")
            if kind in (".old", ".tmp"):
                shutil.rmtree(path + kind, ignore_errors=True)

    def _load(self):
        if dist.rank() == 0:
            self._tidy()
        dist.wait()
        steps = self._checkpoints()
        shared = f"--resume: the processes see different checkpoints in {self.state}; all hosts must share it"
        require(all(seen == steps for seen in dist.gather(steps)), shared)
        for name in reversed(steps):
            folder = os.path.join(self.state, name)
            path = os.path.join(folder, "state.pt")
            if said := dist.gather(damage(folder) if dist.rank() == 0 else None)[0]:
                if self.cfg.resume != "auto":
                    older = "--resume auto takes the newest one that is whole, --overwrite starts anew"
                    raise UserError(f"--resume: damaged: {said}; {older}")
                print(f"resume: skipped as damaged: {said}")
                continue
            # one of a run without --shard holds all tensors, of which a process then keeps its pieces
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=self.cfg.shard)
            made_by = state["trainer"]
            require(made_by == trainer_of(self.cfg), f"--resume: {self.out} is a run of {made_by}.py")
            shards = os.path.join(folder, sharding.SHARDS)
            if os.path.isdir(shards):
                state |= sharding.read(shards, self.models, self.optimizer)
            for key, model in self.models.items():
                self._fit(model, state["models"].get(key), path, key)
            if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(state["frozen"], self.frozen)):
                raise UserError(f"--resume: the reference is not the one that {self.out} was started with")
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            moments = {i: {k: sharding.shard_like(x, params[i]) for k, x in of.items()}
                       for i, of in state["optimizer"]["state"].items()}  # fmt: skip
            mine = self.optimizer.state_dict()["param_groups"]  # --lr and --weight_decay of this run
            self.optimizer.load_state_dict({"state": moments, "param_groups": mine})
            print(f"resume: {self.out} from step {state['step']}")
            return state["step"], state["extra"]
        if steps:
            raise UserError(f"--resume: every checkpoint in {self.state} is damaged; --overwrite starts anew")
        print(f"resume: {self.out} has no complete checkpoint yet; starting at step 0")
        return 0, {}

    def _checkpoints(self):
        names = (d for d in os.listdir(self.state) if d.startswith("step-") and d[5:].isdigit())
        return sorted(names, key=lambda d: int(d[5:]))

    def _fit(self, model, saved, path, key):
        mine = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        theirs = {k: tuple(v.shape) for k, v in (saved or {}).items()}
        wrong = sorted(k for k in set(mine) | set(theirs) if mine.get(k) != theirs.get(k))
        if wrong:
            k = wrong[0]
            shapes = f"{k} is {theirs.get(k)} there and {mine.get(k)} here ({len(wrong)} tensors differ)"
            hint = f"{self.changed or 'no flag differs'}; resume with the flags in config.json"
            raise UserError(f"--resume: {path} does not fit this {key}: {shapes}; {hint}")
        model.load_state_dict({k: sharding.shard_like(saved[k], v) for k, v in model.state_dict().items()})

    def save(self, step, extra=None):
        """State after `step` steps. RunError if it cannot be written; the older checkpoints stay.

        With --shard every process writes its own pieces of the tensors into the same new folder.
        """
        state = {"step": step, "trainer": trainer_of(self.cfg), "extra": extra or {}, "frozen": self.frozen}
        tensors = {"models": {k: m.state_dict() for k, m in self.models.items()},
                   "optimizer": self.optimizer.state_dict()}  # fmt: skip
        state |= {} if self.cfg.shard else tensors
        folder, first = os.path.join(self.state, f"step-{step:06d}"), dist.rank() == 0
        if not (first or self.cfg.shard):
            return
        self.log.sync()  # the rows before this step must not be lost after it is saved
        size = tensor_bytes(state | tensors)
        with new_folder(folder, True, size) if first else contextlib.nullcontext(f"{folder}.tmp") as tmp:
            if self.cfg.shard:
                sharding.write(os.path.join(tmp, sharding.SHARDS), **tensors)
            if first:
                with open(os.path.join(tmp, "state.pt"), "wb") as f:
                    torch.save(state, f)
        # Newer ones are damaged, or --resume auto would not be here: they must not push out those that count.
        so_far = [name for name in self._checkpoints() if int(name[5:]) <= step]
        for old in so_far[: -self.cfg.keep] if first else ():
            shutil.rmtree(os.path.join(self.state, old), ignore_errors=True)

    def checkpoint(self, done, export, extra=None):
        """After each step: save when due, at the end and when asked to stop (then raise Interrupted).

        done: steps finished so far; export: writes model/.
        """
        # A signal may reach one process a step later. What another has got is not noted in self.signum: when
        # this one's own comes, that is no second Ctrl-C.
        signum = dist.largest(self.signum or 0)
        last = done == self.cfg.steps
        if last or signum or (self.cfg.save_every and done % self.cfg.save_every == 0):
            for name, model in self.models.items():
                sharding.reshard(model)
                if not all(sharding.local(p).isfinite().all() for p in model.parameters()):
                    raise RunError(f"step {done - 1} left weights of the {name} not finite; lower --lr")
            export()  # first: were it lost after the state of the last step, no --resume would make it again
            self.save(done, extra)
            signum = dist.largest(self.signum or signum)  # one may have come meanwhile
        if signum:
            raise Interrupted(signum)

    def __exit__(self, kind, error, trace):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if self.log is not None:
            self.log.close(self.panels if kind is None or kind is Interrupted else ())
        self._unlock()
        if kind is None:
            print(f"written: {self.out}/model, metrics.csv, samples.jsonl, curves.png")

    def check(self, step, loss, gnorm, where, batch=None, models=()):
        """Stop before the optimizer step if loss or gradient is not finite: nothing is spoilt yet.

        batch and models, what the trainer's `gradient` was given, go into a file for nanorlhf/run/replay.py.
        """
        if not (math.isfinite(loss) and math.isfinite(gnorm)):
            look = "look at the end of metrics.csv (gnorm, kl, ratio_max); most often --lr is too high"
            kept = "--resume goes on from the last checkpoint" if self._checkpoints() else "no checkpoint yet"
            found = f"step {step}: loss {loss:g}, gradient norm {gnorm:g} ({where})"
            if batch is not None:
                path = os.path.join(self.out, f"bad-step-{step}.pt")
                try:
                    replay.save(path, trainer_of(self.cfg), self.cfg, step, models, batch)
                    look = f"python -m nanorlhf.run.replay {path} shows where it arises; {look}"
                except (OSError, RuntimeError) as e:
                    print(f"warning: {path} could not be written ({str(e).splitlines()[0]})")
            raise RunError(f"{found}; this update was not made; {look}; {kept}")
