"""What a run writes while it goes on: metrics.csv, samples.jsonl, the console lines, the progress bar."""

import contextlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from nanorlhf.errors import UserError, require, visible
from nanorlhf.look import doctor, page
from nanorlhf.look.plots import plot_curves
from nanorlhf.look.tokens import FILE, TokenLog
from nanorlhf.run import dist, pulse
from nanorlhf.run.cli import to_json
from nanorlhf.run.folders import read_rows

FILES = ("metrics.csv", "samples.jsonl", "tokens.jsonl.gz")


class Result(dict):
    """What train(cfg) returns: the figures measured last, with the folder and every step of the whole run.

    path   the run folder
    rows   one dict a step, read from metrics.csv at the end; None where nothing was measured
    look_s seconds that tokens.jsonl.gz took, to be held against the sum of the column s
    """

    path = ""
    rows = ()
    look_s = 0.0


class Log:
    """metrics.csv (one row a step), samples.jsonl, about 20 console lines within 80 columns, a bar with ETA.

    Slow steps have a line each: none is later than run/pulse.py allows.

    A full disk does not end the run here: it is said once, and training goes on. Of several processes only
    the first writes.

    state is that of the checkpoint that a resumed run goes on from: "step", "sizes" (the bytes of each file),
    and "last" (the figures measured last). What was written after it is cut off: those steps run again.
    """

    def __init__(self, cfg, columns, show, state, tok=None):
        steps = cfg.steps
        self.out = Path(cfg.out)
        self.columns = columns
        self.widths = {"step": 8} | {name: max(9, len(name) + 2) for name in show}
        self.steps = steps
        self.every = max(1, steps // 20)  # steps between console lines
        self.printed = False  # whether the names stand above the console lines
        self.disk_is_full = False
        self.last = Result(state["last"])  # name → the figure measured last
        self.last.path = str(cfg.out)
        self.writes = dist.rank() == 0
        self.bar = tqdm(
            total=steps,
            initial=state["step"],
            disable=None,
            leave=False,
            dynamic_ncols=True,
            desc=self.out.name,
            file=sys.stdout
        )
        self.wandb = None
        self.step = state["step"]  # the step that the next row is of
        self.tokens = TokenLog(cfg, tok, partial(self._append, FILE))
        if not self.writes:
            return
        pulse.printed()
        for name in FILES:
            with open(self.out / name, "ab") as f:
                size = state["sizes"].get(name, 0)
                f.truncate(min(size, f.tell()))  # a size above that of the file would add zeros
        header = ",".join(columns) + "\n"
        if os.path.getsize(self.out / "metrics.csv") == 0:
            self._append("metrics.csv", header)
        with open(self.out / "metrics.csv", encoding="utf-8", errors="replace") as f:
            same = self.disk_is_full or f.readline() == header
            require(same, f"--resume: {cfg.out}/metrics.csv has other columns; is --reward given as before?")
        if cfg.wandb:
            self.wandb = import_wandb().init(project=cfg.wandb, name=self.out.name, config=to_json(cfg))

    def _append(self, name, text):
        """Append text, or bytes, to one of the files."""
        if not self.writes:
            return
        path = self.out / name
        if isinstance(text, str):
            # A lone surrogate has no UTF-8; what backslashreplace makes of it is its JSON escape.
            text = text.encode(errors="backslashreplace")
        try:
            with open(path, "ab") as f:
                f.write(text)
        except OSError as e:
            if not self.disk_is_full:
                self.say(f"warning: cannot write {path} ({e.strerror}); training goes on without it")
            self.disk_is_full = True

    def sync(self):
        """Make the lines written so far outlast a power cut → {file: its bytes}."""
        sizes = {}
        for name in FILES:
            with contextlib.suppress(OSError):  # _append has said that the disk is full
                with open(self.out / name, "ab") as f:
                    sizes[name] = f.tell()
                    os.fsync(f.fileno())
        return sizes

    def say(self, text):
        """Print a line, above the progress bar."""
        self.bar.clear()
        print(visible(text), flush=True)
        pulse.printed()
        self.bar.refresh()

    def row(self, step, metrics):
        """Write one step. metrics: {column: number, or None where nothing was measured}."""
        assert set(metrics) <= set(self.columns), set(metrics) - set(self.columns)
        measured = {name: value for name, value in metrics.items() if value is not None}
        for name in metrics.keys() - measured.keys():
            self.last.pop(name, None)
        self.last |= measured
        cells = [f"{measured[name]:.6g}" if name in measured else "" for name in self.columns]
        cells[0] = str(step)
        self.tokens.end()
        self._append("metrics.csv", ",".join(cells) + "\n")
        self.step = step + 1
        self.bar.update(1)
        if step % self.every == 0 or step == self.steps - 1 or pulse.is_late():
            self._print(measured | {"step": step})
        if self.wandb:
            self.wandb.log(measured, step=step)

    def _print(self, values):
        """One console line, and the names above the first."""
        if not self.printed:
            self.say("".join(f"{name:>{width}}" for name, width in self.widths.items()))
        self.printed = True
        self.say("".join(f"{_cell(values.get(name)):>{width}}" for name, width in self.widths.items()))

    def samples(self, step, rows, texts, score):
        """Write to samples.jsonl: prompts (of the data's rows), responses, and scores, (B,) or None.

        A Chat is written as the model has read it, with the control tokens of its template.
        """
        lines = []
        for i, (row, text) in enumerate(zip(rows, texts)):
            prompt = getattr(row["prompt"], "seen", None) or row["prompt"]
            sample = {"step": step, "prompt": prompt, "response": text}
            if score is not None:
                sample["reward"] = round(score[i].item(), 4)
            lines.append(visible(json.dumps(sample, ensure_ascii=False)) + "\n")
        self._append("samples.jsonl", "".join(lines))

    def close(self, panels=()):
        """End the bar, read the rows of the run, draw curves.png, write look.html, ask the doctor."""
        self.bar.close()
        pulse.end()
        if panels:
            self.tokens.end()  # of the step that a run broke in
        self.last.look_s = self.tokens.seconds
        if panels and self.writes:
            self.last.rows = read_rows(self.out)
            plot_curves(self.out, self.last.rows, panels)
            found = doctor.try_findings(self.out)
            page.try_write(self.out, found)
            if found is not None:
                print(doctor.summary(self.out, found))
        if self.wandb:
            self.wandb.finish()


def _cell(value):
    """A number for the console, at most 8 characters or so: 0.123, 1234, 5e-05; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    if 1e-7 < abs(value) < 1e-3:
        return f"{value:.0e}"
    value = round(value, 3) + 0.0  # no −0.000
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"


def import_wandb():
    """The module for --wandb. UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the wandb package: pip install wandb") from None
    return wandb


class Clock:
    """Seconds and tokens of a step, for the columns `s` and `tok_s`."""

    def __init__(self):
        self.start = time.perf_counter()

    def columns(self, tokens):
        s = time.perf_counter() - self.start
        return {"tok_s": tokens / s, "s": s}


def due(step, every):
    """Whether something happens at this step that happens at step 0 and every `every` steps; 0: at step 0."""
    return step == 0 or (every > 0 and step % every == 0)


def health(metrics, mean_adv, tokens, ref_is_init=True, exact=True):
    """Vital signs of the first step, in 80 columns. A figure that is not as it must be is explained below.

    metrics: gap, the largest |logp − old_logp| of the first minibatch, before any update, or none where the
    policy has not sampled; kl, nats per sequence to the reference, or None; dead, the share of groups with
    equal rewards, or None; stop, the share of responses that ended by themselves. mean_adv: mean advantage,
    or None where it need not be near 0.
    tokens: sampled tokens, EOS among them. exact: whether activations are fp32; bfloat16 moves single
    log-probs by a tenth or so.
    """
    gap = metrics.get("gap")
    kl = metrics["kl"]
    signs = ["health: no ratio" if gap is None else f"health: ratio 1 ± {gap:.0e}"]
    signs.append("no reference" if kl is None else f"KL {abs(kl):.6f}")
    if mean_adv is not None:
        signs.append(f"mean advantage {abs(mean_adv):.3f}")
    signs.append(f"{tokens} tokens")
    lines = [" · ".join(signs)]
    if (gap or 0.0) > (1e-4 if exact else 0.5):
        lines.append("ratio is not 1: sampling and scoring disagree")
    if ref_is_init and kl is not None and abs(kl) > (1e-3 if exact else 0.5):
        lines.append("KL is not 0: the reference is not the policy")
    if abs(mean_adv or 0.0) > 0.1:
        lines.append("mean advantage is not near 0: rewards and groups do not belong together")
    if (metrics["dead"] or 0.0) > 0.8:
        lines.append("most groups are dead: there is little to learn from prompts so hard or so easy")
    learns = metrics["dead"] is not None and metrics["dead"] < 0.5  # also to end
    if metrics["stop"] < 0.5 and not learns:
        lines.append("most responses are cut: raise --max_new_tokens if the reward comes later")
    return "\n  !! ".join(lines)
