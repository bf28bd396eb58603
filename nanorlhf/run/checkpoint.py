"""Run folders and everything a run needs to go on. Nothing is ever half-written.

    out/config.json  metrics.csv  samples.jsonl  tokens.jsonl.gz  curves.png  look.html
    model/ (a Hugging Face folder)
    state/step-000020/ (resuming)

A folder is written under a temporary name, fsynced, and renamed into place. A checkpoint lists the size and
sha256 of each of its files, since neither torch.load nor safetensors notices a flipped bit. All randomness is
derived from (seed, step), so that weights, optimizer and step are the whole state of a run. Of weights that
are frozen under adapters a checkpoint holds the folder and a sha256.
"""

import contextlib
import hashlib
import math
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch

from nanorlhf import lora
from nanorlhf.errors import Interrupted, RunError, UserError, reason_of, require, shown
from nanorlhf.hub.files import read_json
from nanorlhf.run import dist, replay, sharding
from nanorlhf.run.cli import to_json
from nanorlhf.run.folders import (
    new_folder,
    remove,
    require_plain,
    sha256,
    take_lock,
    verify,
    write_json,
)
from nanorlhf.run.log import FILES, Log, due, import_wandb

NEW_RUN = {"step": 0, "extra": {}, "sizes": {}, "last": {}}  # the state of a run without a checkpoint
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of one weight, as AdamW calls them
# Errors that a checkpoint whose values have other types or sizes leads to.
FOREIGN = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)
# What a run that was killed may leave half-written beside state/; any other *.tmp there is the user's.
HALF_WRITTEN = ("config.json.tmp", "look.html.tmp", "bad-step-*.pt.tmp", ".pairs*.jsonl.*.tmp")
KEEP = 2  # checkpoints kept in state/: if the newest one is damaged, the run goes on from the other


def damage(folder):
    """What is wrong with a checkpoint, or None."""
    path = os.path.join(folder, "state.pt")
    try:
        verify(folder)
        torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except UserError as e:
        return str(e)
    except Exception as e:  # torch's reader raises whatever the bytes of a file that is none lead it to
        return f"{path}: {reason_of(e)}"


def trainer_of(cfg):
    """The name of the file that defines this Config: "train_ppo", also when it runs as a script."""
    module = sys.modules[type(cfg).__module__]
    return Path(getattr(module, "__file__", "notebook")).stem


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

    def __init__(self, cfg, columns, show, panels, tok=None):
        self.cfg = cfg
        self.out = cfg.out
        self.config = Path(cfg.out, "config.json")
        self.state = Path(cfg.out, "state")
        self.columns = columns
        self.show = show
        self.panels = panels
        self.tok = tok
        self.log = None
        self.lock = None
        self.signum = None  # the signal that asked this run to stop
        self.handlers = {}  # signal → its handler outside of this run
        self.first = dist.rank() == 0  # of several processes, the one that writes
        if cfg.wandb:
            import_wandb()  # if it is missing, say so before anything is touched
        require(not (cfg.resume and cfg.overwrite), "--resume and --overwrite: give one of the two")
        require(cfg.resume or not cfg.new_data, "--new_data: belongs to --resume")

    def __enter__(self):
        with self._usable():
            os.makedirs(self.out, exist_ok=True)
            require_plain(self.out)
            # Without config.json they may be the user's own: --out . in a folder that has a model/, say.
            holds = any(Path(self.out, name).exists() for name in ("config.json", *FILES))
            holds = holds or Path(self.out, "model").is_dir() or self.state.is_dir() and self._steps()
            if holds and not (self.cfg.resume or self.cfg.overwrite):
                raise UserError(f"--out {self.out} holds a run{self._choices()}")
            if self.first:
                self.lock = take_lock(self.out)
        for line in getattr(self.cfg, "notes", ()):
            print(line)
        return self

    def __exit__(self, kind, error, trace):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        if self.log is not None:
            ended = kind in (None, Interrupted, RunError)  # in the page of a run that broke one finds the bug
            self.log.close(self.panels if ended else ())
        if self.lock is not None:
            os.close(self.lock)
        if kind is None:
            print(f"written: {self.out}/model, metrics.csv, samples.jsonl, curves.png, look.html")
        if kind is RunError and self.log is not None:
            print(f"written: {self.out}/metrics.csv, curves.png, look.html: the run as far as it went")

    def _choices(self):
        """What to do about the run in --out, which nobody wants replaced by a run on other data."""
        old = read_json(self.config)
        for name in ("data", "task"):
            was = old.get(name)
            if was is not None and was != getattr(self.cfg, name, was):
                return f" of --{name} {was or 'not given'}; name another folder"
        return ": add --resume to go on with it, --overwrite to replace it, or name another folder"

    @contextlib.contextmanager
    def _usable(self):
        """Inside, an error of the disk is a UserError that names --out."""
        try:
            yield
        except OSError as e:
            raise UserError(f"--out {self.out}: cannot be used as a run folder ({e.strerror})") from None

    # --------------------------------------------------------------------------------------------------------
    # start, and resume

    def start(self, models, optimizer, frozen=(), extra=None):
        """Load the newest whole checkpoint if --resume, open the log → (first step to run, extra dict).

        models: {name: model} to save. frozen: models (or None) that the run only reads; a resumed run must
        have the same. extra: what else the trainer keeps, as it is before the first step; a checkpoint has
        values of the same types. Nothing of an older run is touched before this call: a mistaken flag or bad
        data cost nothing.
        """
        self.extra = extra or {}
        self.models = models
        self.optimizer = optimizer
        frozen = [model for model in frozen if model is not None]
        self.ref = models.get("base") or next(iter(frozen), None)  # DPO's, which may move between rounds
        self.frozen = [_checksum(model) for model in frozen]
        self.base = self._bases()
        self.data = sha256(self.cfg.data) if self.cfg.data else ""
        config = to_json(self.cfg)
        dist.wait()  # until all processes have looked whether --out holds a run
        state = NEW_RUN | {"extra": self.extra}
        with self._usable():
            if self.cfg.overwrite and self.first:
                remove(f"{self.out}/model")
                remove(self.state)
            self.state.mkdir(exist_ok=True)
            if self.cfg.resume:
                self.changed = self._compare(config)
                state = self._load()
            self.log = Log(self.cfg, self.columns, self.show, state, self.tok)
            if self.first:
                write_json(self.config, config)
        optimizer.register_step_post_hook(self.log.tokens.after_update)
        if threading.current_thread() is threading.main_thread():  # other threads may set no handlers
            signals = {signal.SIGINT, signal.SIGTERM}
            hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # its terminal is closed; not on Windows
            if signal.getsignal(hangup) != signal.SIG_IGN:  # nohup asks to ignore it
                signals.add(hangup)
            for signum in signals:
                self.handlers[signum] = signal.signal(signum, self._stop)
        return state["step"], state["extra"]

    def _bases(self):
        """→ {model: [flag, folder, sha256]} of the frozen weights that its adapters belong to."""
        found = {}
        for name, model in self.models.items():
            if not lora.rank_in(model.state_dict()):
                continue
            flag = "critic_init" if name == "critic" else "init"
            folder = getattr(self.cfg, flag)
            inside = f"--{flag} {folder}: lies in --out {self.out}, where this run writes its own model"
            outside = Path(self.out).resolve() not in Path(folder).resolve().parents
            require(outside, f"{inside}; name another --out")
            checksum = dist.gather(_sha256_of(folder) if self.first else None)[0]
            found[name] = [f"--{flag}", folder, checksum]
        return found

    def _compare(self, config):
        """Print which flags differ from those in config.json → the same as one line, for `_fit`."""
        try:
            old = read_json(self.config)
        except UserError:
            raise UserError(f"{self.config} is damaged: it is not JSON; --overwrite starts anew") from None
        changed = []
        for name in sorted(config.keys() & old.keys() - {"resume", "overwrite", "new_data"}):
            if old[name] != config[name]:
                change = shown(f"--{name} was {old[name]}, is now {config[name]}")
                print(f"resume: {change}")
                changed.append(change)
        return "; ".join(changed)

    def _load(self):
        """Load the newest checkpoint that is whole, and name those that are not → its state, or NEW_RUN."""
        if self.first:
            self._tidy()
        dist.wait()
        steps = self._steps()
        shared = f"--resume: the processes see different checkpoints in {self.state}; all hosts must share it"
        require(all(seen == steps for seen in dist.gather(steps)), shared)
        problems = []
        for step in reversed(steps):
            folder = self._folder(step)
            problem = dist.gather(damage(folder) if self.first else None)[0]
            if problem is None:
                return self._load_from(folder)
            print(f"warning: --resume skipped as damaged: {shown(problem)}")
            problems.append(problem)
        if problems:
            newest = f"the newest: {problems[0]}; --overwrite starts anew"
            raise UserError(f"--resume: every checkpoint in {self.state} is damaged; {newest}")
        print(f"resume: {self.out} has no complete checkpoint yet; starting at step 0")
        return NEW_RUN | {"extra": self.extra}

    def _load_from(self, folder):
        path = folder / "state.pt"
        try:
            state = self._read(path)
        except FOREIGN as e:
            message = f"--resume: {path}: not a checkpoint of this version ({reason_of(e)})"
            raise UserError(f"{message:.400}; --overwrite starts anew") from None
        print(f"resume: {self.out} from step {state['step']}")
        return state

    def _read(self, path):
        """Read a checkpoint into models and optimizer → its state. Any error in it is one of its contents."""
        # Without --shard the file holds all tensors. With mmap a sharded run reads them one at a time.
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=self.cfg.shard)
        shards = path.parent / sharding.SHARDS
        if shards.is_dir():
            state |= sharding.read(shards)
        self._check_state(state, path)
        for weights in state["extra"].get("past", []):  # of GRPO's sampler; the policy's own come after them
            self._fit(self.models["policy"], weights, path, "sampler")
        for key, model in self.models.items():
            self._fit(model, state["models"].get(key, {}), path, key)
        for name, (_, folder, now) in self.base.items():
            flag, was, before = state["base"][name]
            changed = f"--resume: {flag} {folder} is not the base that the adapters in {self.out} belong to"
            hashes = f"{was}, sha256 {before[:12]} then, {now[:12]} now"
            require(before == now, f"{changed} ({hashes}); put that one back")
        pairs = zip(state["frozen"], self.frozen)
        same = all(math.isclose(was, now, rel_tol=1e-9) for was, now in pairs)
        same = same and len(state["frozen"]) == len(self.frozen)
        require(same, f"--resume: the reference is not the one that {self.out} was started with")
        self._compare_data(state["data"])
        self._load_moments(state["optimizer"]["state"], path)
        return state

    def _check_state(self, state, path):
        """UserError unless this is a state that `save` may have written, at a step from 0 to --steps.

        A state of step −3 would train three steps too many, one of step 1e9 would end at once, with status 0.
        """
        foreign = f"--resume: {path}: not a checkpoint of this version"
        require(isinstance(state, dict), f"{foreign}; --overwrite starts anew")
        made_by = state["trainer"]
        require(made_by == trainer_of(self.cfg), f"--resume: {self.out} is a run of {made_by}.py")
        step = state["step"]
        require(path.parent == self._folder(step), f"{foreign} (its step is {step}); --overwrite starts anew")
        for name, like in self.extra.items():
            saved = state["extra"][name]
            good = type(saved) is type(like)
            if type(like) in (int, float):
                good = good and 0 <= saved < 1e15
            require(good, f"{foreign} ({name} is {saved!r:.80}); --overwrite starts anew")
        for passed, sampled in state["extra"].get("history", {}).values():  # of one prompt of GRPO
            good = sampled >= 1 and 0 <= passed <= sampled
            require(good, f"{foreign} ({passed} of {sampled} samples passed); --overwrite starts anew")
        good = all(type(n) is int and n >= 0 for n in state["sizes"].values())
        good = good and all(type(x) in (int, float) for x in state["last"].values())
        require(good, f"{foreign} (its figures are no numbers); --overwrite starts anew")
        beyond = f"--resume: {self.out} is at step {step}, beyond --steps {self.cfg.steps}; give more steps"
        require(step <= self.cfg.steps, beyond)

    def _compare_data(self, saved):
        """UserError if --data is not the file of the checkpoint, whose sha256 is `saved`, without --new_data.

        A step takes its rows by their numbers: from a changed file it would take some twice and others never.
        """
        if saved == self.data:
            return
        hashes = f"sha256 {saved[:12] or 'none'} then, {self.data[:12] or 'none'} now"
        changed = f"--data {self.cfg.data or 'none'} is not what {self.out} was trained on ({hashes})"
        remedy = "put the old file back, or add --new_data to go on with other rows"
        require(self.cfg.new_data, f"--resume: {changed}; {remedy}")
        print(f"resume: {changed}")

    def _load_moments(self, saved, path):
        """Adam's moments of each weight, by its number. Learning rate and weight decay are this run's own."""
        groups = self.optimizer.state_dict()["param_groups"]
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        foreign = f"--resume: {path}: Adam's moments do not fit the weights; --overwrite starts anew"
        require(saved.keys() <= set(range(len(params))), foreign)
        moments = {}
        for i, tensors in saved.items():
            moments[i] = {}
            require(tensors.keys() == MOMENTS, foreign)
            for name, x in tensors.items():
                moments[i][name] = sharding.shard_like(x, params[i])
                require(name == "step" or moments[i][name].shape == params[i].shape, foreign)
                here = sharding.local(moments[i][name])
                finite = here.is_floating_point() and here.isfinite().all()
                require(finite and (name == "exp_avg" or (here >= 0).all()), foreign)
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _fit(self, model, saved, path, key):
        """Load saved tensors into a model. UserError, with the flags that changed, if their shapes differ."""
        here = model.state_dict()
        own = lora.own_weights(model)
        tensors = {name: x for name, x in here.items() if name not in own}  # frozen, and read from their base
        for name, x in saved.items():
            tensors[name] = sharding.shard_like(x, here.get(name))
            local = sharding.local(tensors[name])
            if not (local.is_floating_point() and local.isfinite().all()):
                raise ValueError(f"{name} of the {key} is not finite")
        try:
            model.load_state_dict(tensors)
        except RuntimeError as e:
            first_difference = str(e).splitlines()[1].strip()
            hint = f"{self.changed or 'no flag differs'}; resume with the flags in config.json"
            message = f"--resume: {path} does not fit this {key}: {first_difference:.200}; {hint}"
            raise UserError(message) from None

    def _tidy(self):
        """Remove what a crash left half-written, or did not remove: --resume replaces damaged ones only."""
        halves = [*self.state.glob("*.tmp"), *self.state.glob("*.old")]
        for name in HALF_WRITTEN:
            halves += Path(self.out).glob(name)
        for path in halves:
            if path.suffix == ".tmp":
                print(shown(f"resume: {path.with_suffix('')} was never completed; removed"))
            remove(path)

    def _steps(self):
        """Steps of the checkpoints in state/, ascending. Another name, step-final say, is none of ours."""
        names = [path.name for path in self.state.iterdir()]
        return sorted(int(name[5:]) for name in names if re.fullmatch("step-[0-9]{6,12}", name))

    def _folder(self, step):
        return self.state / f"step-{step:06d}"

    # --------------------------------------------------------------------------------------------------------
    # each step

    def rollout(self, step, roll, policy, batch, **tensors):
        """At every --sample_every-th step, before its updates: log samples and what is known of each token.

        batch: that of the updates; tensors: what the trainer has besides, (B,) or (B, T), by name.
        """
        if self._logged(step, self.cfg.sample_every):
            self.log.samples(step, roll.rows, roll.texts, roll.reward)
            self.log.tokens.rollout(step, roll, policy, batch, tensors)

    def _logged(self, step, every):
        return due(step, every) or step + 1 == self.cfg.steps

    def held_out(self, roll, score):
        """Responses to held-out prompts, and their scores (B,): kept for the page of the run."""
        self.log.tokens.held_out(self.log.step, roll, score)

    def check(self, step, loss, gnorm, where, batch, models):
        """RunError, before the optimizer step, if loss or gradient is not finite: no weight is spoilt yet.

        batch and models, the arguments of the trainer's `gradient`, are written to a file for run/replay.py.
        At logged steps, and at the one that fails, what the models say of the batch's tokens goes to
        tokens.jsonl.gz.
        """
        finite = math.isfinite(loss) and math.isfinite(gnorm)
        if hasattr(self.cfg, "sample_every"):
            self.log.tokens.minibatch(batch, models)
        elif not finite or self._logged(step, self.cfg.eval_every):
            self.log.tokens.batch(step, batch, models, self.ref)
        if finite:
            return
        advice = "look at the end of metrics.csv (gnorm, kl, ratio_max); most often --lr is too high"
        path = f"{self.out}/bad-step-{step}.pt"
        try:
            replay.save(path, trainer_of(self.cfg), self.cfg, step, models, batch)
            advice = f"{path} holds the batch; docs/reliability.md shows how to replay it; {advice}"
        except (OSError, RuntimeError) as e:
            print(f"warning: {path} could not be written ({reason_of(e)})")
        figures = f"loss {loss:g}, gradient norm {gnorm:g} ({where})"
        raise RunError(f"step {step}: {figures}; this update was not made; {advice}")

    def checkpoint(self, done, export, extra=None):
        """After each step: save when due, at the end and when asked to stop (then raise Interrupted).

        done: steps finished so far; export: writes model/; extra: what else the trainer needs to go on.
        """
        # A signal may reach one process a step later than another. self.signum stays this process's own: else
        # its first signal would count as a second Ctrl-C.
        signum = dist.largest(self.signum or 0)
        due = self.cfg.save_every and done % self.cfg.save_every == 0
        if due or signum or done == self.cfg.steps:
            self._require_finite(done)
            export()  # first: --resume of a run whose last state is saved would not write model/ again
            self.save(done, extra)
            signum = dist.largest(self.signum or signum)  # one may have come meanwhile
        if signum:
            raise Interrupted(signum)

    def _require_finite(self, done):
        for name, model in self.models.items():
            sharding.reshard(model)
            if not all(sharding.local(p).isfinite().all() for p in model.parameters()):
                raise RunError(f"step {done - 1} left weights of the {name} not finite; lower --lr")

    def save(self, step, extra=None):
        """Save the state after `step` steps. RunError if it cannot be written; the older checkpoints stay.

        With --shard every process writes its own pieces of the tensors into the same new folder.
        """
        state = {
            "step": step,
            "trainer": trainer_of(self.cfg),
            "data": self.data,
            "extra": extra or {},
            "frozen": self.frozen,
            "base": self.base,
        }
        models = {name: lora.own_weights(model) for name, model in self.models.items()}
        tensors = {"models": models, "optimizer": self.optimizer.state_dict()}
        folder = self._folder(step)
        shards = f"{folder}.tmp/{sharding.SHARDS}"
        if not self.first:
            if self.cfg.shard:
                sharding.write(shards, tensors)
            return
        # The rows before this step must not be lost after it is saved.
        state |= {"sizes": self.log.sync(), "last": dict(self.log.last)}
        with new_folder(folder, manifest=True) as tmp:
            if self.cfg.shard:
                sharding.write(shards, tensors)
            else:
                state |= tensors
            with open(f"{tmp}/state.pt", "wb") as f:
                torch.save(state, f)
        # Checkpoints of later steps are damaged, or --resume would have started from them: they do not count,
        # or they would push out the whole ones.
        so_far = [saved for saved in self._steps() if saved <= step]
        for old in so_far[:-KEEP]:
            shutil.rmtree(self._folder(old), ignore_errors=True)

    def _stop(self, signum, frame):
        """Handler of Ctrl-C, SIGTERM and SIGHUP: note the first, end at once on the second."""
        if self.signum is not None:
            raise KeyboardInterrupt(128 + signum)
        self.signum = signum
        self.log.say("\nstopping after this step (once more to stop at once)")


def _sha256_of(folder):
    """One sha256 of all files that a model is read from: a .gguf, or config.json and the safetensors."""
    path = Path(folder)
    files = [path, path / "config.json", *sorted(path.glob("*.safetensors"))]
    checksums = [sha256(file) for file in files if file.is_file()]
    return hashlib.sha256(" ".join(checksums).encode()).hexdigest()


def _checksum(model):
    """The sum of all weights of a model, in float64: enough to tell one reference from another."""
    total = 0.0
    for p in model.parameters():
        weights = p.detach()
        if weights.device.type == "mps":  # a Mac's GPU has no float64
            weights = weights.cpu()
        total += sharding.full(weights.double().sum()).item()
    return total
