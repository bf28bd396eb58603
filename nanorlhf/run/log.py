"""What a run writes while it goes on: metrics.csv, samples.jsonl, the console line, the progress bar."""

import contextlib
import csv
import json
import os
import sys
import time

from tqdm import tqdm

from nanorlhf.errors import UserError
from nanorlhf.look.plots import plot_curves
from nanorlhf.run import dist


class Log:
    """metrics.csv (one row a step), samples.jsonl, an aligned console line within 80 columns, a bar with ETA.

    A full disk here must not end the run: it is said once and training goes on. `start` > 0 (resuming) drops
    the rows of steps that will be run again. Of several processes only the first writes.
    """

    def __init__(self, out, columns, show, steps, start=0, wandb="", config=None):
        self.columns, self.out = columns, out
        self.widths = {"step": 8} | {name: max(9, len(name) + 2) for name in show}
        self.every, self.printed, self.warned = max(1, steps // 20), 0, False
        self.last, self.writes = {}, dist.rank() == 0
        self._keep_before(start)
        self.bar = tqdm(total=steps, initial=start, disable=None, leave=False, dynamic_ncols=True,
                        desc=os.path.basename(out), file=sys.stdout)
        self.steps = steps
        wandb, project = import_wandb(wandb), wandb
        self.wandb = None
        if wandb and self.writes:
            self.wandb = wandb.init(project=project, name=os.path.basename(out), config=config)

    def _keep_before(self, start):
        """Both logs without the steps from `start` on, and without lines that a crash or a full disk tore."""
        path = os.path.join(self.out, "metrics.csv")
        rows = []
        if start and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                names, *lines = (line.split(",") for line in f.read().splitlines() or [""])
            for row in (dict(zip(names, cells)) for cells in lines if len(cells) == len(names)):
                with contextlib.suppress(ValueError, KeyError):
                    if int(row["step"]) < start and [float(cell or 0) for cell in row.values()]:
                        rows.append(row)
        for row in rows:  # a run resumed at its very end still knows its figures
            self.last.update({k: float(v) for k, v in row.items() if v and k != "step"})
        if not self.writes:
            return
        with open(path + ".tmp", "w", newline="") as f:
            writer = csv.DictWriter(f, self.columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path + ".tmp", path)
        path = os.path.join(self.out, "samples.jsonl")
        lines = []
        if start and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                for line in f:
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        if json.loads(line)["step"] < start:
                            lines.append(line)
        with open(path + ".tmp", "w", encoding="utf-8", newline="") as f:
            f.writelines(lines)
        os.replace(path + ".tmp", path)

    def _append(self, name, text):
        if not self.writes:
            return
        try:
            path = os.path.join(self.out, name)
            # A lone surrogate has no UTF-8; what backslashreplace makes of it is its JSON escape.
            with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="") as f:
                f.write(text)
        except OSError as e:
            if not self.warned:
                where = f"{self.out}/{name}"
                self.say(f"warning: cannot write {where} ({e.strerror}); training goes on without it")
            self.warned = True

    def sync(self):
        """Make what was written so far outlast a power cut."""
        for name in ("metrics.csv", "samples.jsonl"):
            with contextlib.suppress(OSError), open(os.path.join(self.out, name), "rb+") as f:
                os.fsync(f.fileno())  # a full disk has been said by _append

    def say(self, text):
        self.bar.clear()
        print(text, flush=True)
        self.bar.refresh()

    def row(self, step, metrics):
        """Write one step. Values are plain numbers, None where nothing was measured."""
        assert set(metrics) <= set(self.columns), set(metrics) - set(self.columns)
        unknown = {name for name, value in metrics.items() if value is None}
        metrics = {name: value for name, value in metrics.items() if name not in unknown}
        self.last = {k: v for k, v in self.last.items() if k not in unknown} | metrics
        cells = ["" if metrics.get(c) is None else f"{metrics[c]:.6g}" for c in self.columns]
        cells[0] = str(step)
        self._append("metrics.csv", ",".join(cells) + "\n")
        self.bar.update(1)
        if step % self.every == 0 or step == self.steps - 1:
            if self.printed % 25 == 0:
                self.say("".join(f"{name:>{w}}" for name, w in self.widths.items()))
            self.printed += 1
            values = metrics | {"step": step}
            self.say("".join(f"{_cell(values.get(name)):>{w}}" for name, w in self.widths.items()))
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def samples(self, step, rows, texts, score):
        """A step's prompts (the rows they come from), responses and scores (B,) or None → samples.jsonl."""
        lines = [{"step": step, "prompt": row["prompt"], "response": text} for row, text in zip(rows, texts)]
        for line, s in zip(lines, [] if score is None else score.tolist()):
            line["reward"] = round(s, 4)
        self._append("samples.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))

    def close(self, panels=()):
        self.bar.close()
        if panels and self.writes:
            plot_curves(self.out, panels)
        if self.wandb:
            self.wandb.finish()


def _cell(value):
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    if 1e-7 < abs(value) < 1e-3:
        return f"{value:.0e}"
    value = round(value, 3) + 0.0  # no −0.000
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"


def import_wandb(project):
    """The optional hook, `pip install wandb` and `--wandb PROJECT`: the module, or None without the flag."""
    if not project:
        return None
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
