"""look.html of a run: what its files hold, as one page that needs no network.

`page.html`, `page.css` and `page.js` are put together with the numbers as JSON. Texts of a model reach the
page in that JSON alone, where "<" is written as an escape: a response of </script> ends no script.
"""

import json
import os
from pathlib import Path
from urllib.parse import quote

from nanorlhf.errors import reason_of, require
from nanorlhf.hub.files import read_json, read_jsonl
from nanorlhf.look import doctor, tokens
from nanorlhf.run.folders import read_rows, require_plain

HERE = Path(__file__).parent
ROOT = HERE.parents[1]  # the checkout, to whose lines the page links
LARGEST = 2_600_000  # bytes of tokens in a page; the rest, with 200 steps of curves, is below 400,000
FEWEST_ROWS = 4  # of a step, where long responses leave room for few

# Which trainer a run is of, by a column that only its metrics.csv has.
KINDS = {
    "ppo": "value_loss",
    "grpo": "ratio_max",  # PPO's has it too, and stands before it
    "dpo": "logp_chosen",
    "rm": "eval/acc_len_only",
    "distill": "eval/kl",
    "prm": "eval/acc",
    "sft": "loss",
}

OWN_SAMPLES = ("sft", "rm", "prm", "dpo")  # their samples.jsonl has held-out prompts, the same each time

# Flags that say nothing of how a run learns. A run that is resumed at its end leaves the same page.
ABOUT_FOLDERS = {"out", "overwrite", "resume", "new_data"}

# What the tokens can be coloured by: key, name, kind of scale, meaning. page.js finds the numbers.
QUANTITIES = [
    ("logp", "log-prob", "falling", "log π of the token, in nats: darker is less likely"),
    ("loss", "loss of the token", "rising", "−log π of the demonstrated token, in nats"),
    ("divergence", "divergence, the loss", "rising", "D of student and teacher before this token"),
    ("log_ratio", "log-ratio to the reference", "two", "log π − log π_ref: orange tokens became likelier"),
    ("running", "log-ratio, running sum", "two", "its last value is the response's part of the KL"),
    ("entropy", "entropy", "rising", "of the distribution that the token was drawn from, in nats"),
    ("reward", "reward r_t", "two", "−β · log-ratio at every token, and the score on the last one"),
    ("old_value", "value V_t", "two", "what the critic expects before it sees the token"),
    ("score", "score after the token", "two", "what the model would say if the response ended here"),
    ("change", "change of the score", "two", "score after this token less the score after the one before"),
    ("delta", "surprise δ_t", "two", "r_t + γ V_{t+1} − V_t"),
    ("adv_raw", "advantage, not whitened", "two", "A_t = Σ_k (γλ)^k δ_{t+k}"),
    ("adv", "advantage", "two", "orange tokens are made likelier, blue ones less likely"),
    ("ret", "return R_t", "two", "A_t + V_t, which the critic learns"),
    ("ratio", "ratio ρ_t", "ratio", "π / π_old: orange is above 1, blue below"),
    ("clip", "clipped", "corner", "a clipped token has no gradient: ρ has left 1 ± ε on the side of A"),
    ("w", "weight in the loss", "rising", "what the loss of this token is multiplied by"),
]

# The line of the trainer behind each formula of the page: the first one that holds the text.
LINES = {
    "ppo": {
        "logp": "old_logp = roll.logp",
        "log_ratio": "ref_logp = roll.logp_under(",
        "reward": "reward = torch.where(mask, -beta * (logp - ref_logp), 0.0)",
        "value": "old_value = roll.per_token(",
        "delta": "delta = reward[:, t]",
        "adv": "adv[:, t] = ",
        "ret": "return adv, torch.where(mask, adv + value",
        "whiten": "adv = whiten(adv, mask)",
        "ratio": "ratio = log_ratio.exp()",
        "surrogate": "larger = torch.maximum(unclipped, clipped)",
        "w": "loss = torch.where(mask, larger, 0.0).sum() / denom",
    },
    "grpo": {
        "logp": "old_logp = roll.logp",
        "log_ratio": "ref_logp = roll.logp_under(",
        "reward": "reward = roll.reward + overlong(",
        "adv": "adv = advantages(",
        "ratio": "ratio = log_ratio.exp()",
        "surrogate": "loss = torch.maximum(unclipped, clipped)",
        "k3": "return torch.expm1(log_r) - log_r",
        "w": "def token_weights(",
    },
    "dpo": {
        "logp": "return model.logprobs(tokens, mask)[0].sum(1)",
        "log_ratio": "h_w = logp_w - ref_w",
        "h": "h_w = logp_w - ref_w",
        "margin": "delta = h_w - h_l",
        "pair_loss": "right = -F.logsigmoid(beta * delta)",
    },
    "rm": {"score": "return model.rewards(tokens, lengths).chunk(2)"},
    "prm": {"score": "logit ="},
    "sft": {
        "logp": "model.logprobs(mb[",
        "sft_loss": "return -(logp * mask).sum() / denom",
        "w": "return -(logp * mask).sum() / denom",
    },
    "distill": {
        "logp": "logp, _ = student.logprobs(",
        "log_ratio": "teacher_logp, _ = teacher.logprobs(",
        "divergence": "return linear_kl(hidden, weight, ref_hidden",
        "kl": "kl = linear_kl(hidden",
        "ratio": "ratio = torch.exp(logp - old_logp)",
        "w": "return (mb[",
    },
}


def kind_of(columns):
    """Columns of metrics.csv → "ppo", "grpo", ...: which trainer wrote them."""
    return next((kind for kind, column in KINDS.items() if column in columns), "sft")


def line_of(file, text):
    """The number of the first line of a file of the checkout that holds a text; None if none does."""
    path = ROOT / file
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((number for number, line in enumerate(lines, 1) if text in line), None)


def relative(target, folder):
    """A file of the checkout as a link from a page in `folder`; "" where there is no relative path to it."""
    try:
        path = os.path.relpath(ROOT / target, os.path.abspath(folder))
        return quote(Path(path).as_posix())  # of a folder named "100%" or "a#b", too
    except ValueError:  # another drive of Windows
        return ""


def links(kind, folder):
    """→ {name of a formula: {"text": "train_ppo.py:123", "href": a relative path}}."""
    file = f"train_{kind}.py"
    found = {}
    for name, text in LINES[kind].items():
        number = line_of(file, text)
        if number is not None:
            found[name] = {"text": f"{file}:{number}", "href": relative(file, folder)}
    return found


# ------------------------------------------------------------------------------------------------------------
# what a page holds of a run


def compact(x):
    """A record with each list of equal numbers as one number, and lone surrogates as they are."""
    if isinstance(x, dict):
        as_is = ("ids", "text", "group", "groups")  # of groups the page counts rewards, equal ones too
        return {name: x[name] if name in as_is else compact(x[name]) for name in x}
    if not isinstance(x, list) or not x:
        return x
    if isinstance(x[0], (list, dict)):
        return [compact(part) for part in x]
    return x[0] if len(x) > 2 and all(value == x[0] for value in x) else x


def spread(n, k):
    """k of the numbers 0 … n−1, evenly, with the first and the last."""
    return sorted({round(i * (n - 1) / max(1, k - 1)) for i in range(k)})


def within(records, most):
    """Records whose JSON has at most `most` bytes together, and in words which were left out."""
    n = len(records)
    rows = max((len(record["rows"]) for record in records), default=0)
    shown = rows
    while True:
        some = [record | {"rows": record["rows"][:shown]} for record in records]
        size = sum(len(as_json(record)) for record in some)
        k = max(2, int(n * most / max(1, size)))
        kept = spread(n, min(k, n))
        if k >= min(8, n) or shown <= FEWEST_ROWS:
            break
        shown = max(FEWEST_ROWS, shown // 2)
    left_out = ""
    if len(kept) < n or shown < rows:
        left_out = f"To keep the page small, it shows {len(kept)} of {n} logged steps"
        left_out += f" and {shown} of {rows} rows of each; {tokens.FILE} has them all."
    return [some[i] for i in kept], left_out


def before_and_after(run, kind, records):
    """Held-out prompts with their first and last responses: [{"prompt", "before", "after"}]."""
    logged = [(record["step"], record["held_out"]) for record in records if "held_out" in record]
    if not logged and kind in OWN_SAMPLES:  # elsewhere samples.jsonl has other prompts in every step
        logged = list(held_out_samples(run).items())
    if not logged:
        return []
    first_step, first_rows = logged[0]
    last_step, last_rows = logged[-1]
    found = []
    for first, last in zip(first_rows, last_rows):
        if first["prompt"] == last["prompt"]:
            before = answer(first_step, first)
            after = answer(last_step, last)
            found.append({"prompt": first["prompt"], "before": before, "after": after})
    return found[: tokens.HELD_OUT]


def answer(step, row):
    return {"step": step, "response": row["response"], "reward": row.get("reward")}


def held_out_samples(run):
    """samples.jsonl of a trainer that logs held-out prompts there → {step: rows}."""
    path = Path(run, "samples.jsonl")
    by_step = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            texts = {name: str(row[name]) for name in ("prompt", "response")}
            row = texts | {"step": row["step"], "reward": row.get("reward")}
            by_step.setdefault(row["step"], []).append(row)
        except (ValueError, KeyError, TypeError, RecursionError):  # a line that a full disk cut off
            continue
    return by_step


def of_run(run, folder, most, found):
    """Everything that the page in `folder` says of one run, as a dict for JSON.

    found: the doctor's findings, or None where they are not known yet.
    """
    rows = read_rows(run)
    with open(Path(run, "metrics.csv"), encoding="utf-8", errors="replace") as f:
        columns = f.readline().rstrip("\n").split(",")  # a run that broke in its first step has no rows
    if found is None:
        found = doctor.findings(run)
    kind = kind_of(columns)
    config = read_json(Path(run, "config.json"))
    records = tokens.read(run)
    of_steps = [record for record in records if record.get("rows")]
    shown, left_out = within([compact(record) for record in of_steps], most)
    return {
        "name": Path(run).resolve().name,
        "kind": kind,
        "trainer": f"train_{kind}.py",
        "about": about(config, rows),
        "config": {name: value for name, value in config.items() if name not in ABOUT_FOLDERS},
        "columns": columns,
        "metrics": {name: tokens.rounded([row[name] for row in rows], 5) for name in columns},
        "records": shown,
        "left_out": left_out,
        "before_after": before_and_after(run, kind, records),
        "links": links(kind, folder),
        "findings": [finding | {"href": relative(finding["page"], folder)} for finding in found],
    }


def about(config, rows):
    data = config.get("data") or config.get("task") or "data of its own"
    seconds = sum(row.get("s") or 0 for row in rows)
    return f"{data}, seed {config.get('seed')}, {len(rows)} steps in {seconds:.0f} s"


def demo_answers(folder):
    """before_after.jsonl of the demo → its first rows: [{"prompt", "answers": [[name, {"response"}]]}]."""
    path = Path(folder, "before_after.jsonl")
    rows = read_jsonl(str(path), ("prompt",)) if path.is_file() else []
    names = {"sft": "SFT", "ppo": "PPO", "ppo_nokl": "PPO, β = 0"}
    found = []
    for row in rows[: tokens.HELD_OUT]:
        answers = [[title, {"response": row[name]}] for name, title in names.items() if name in row]
        found.append({"prompt": row["prompt"], "answers": answers})
    return found


# ------------------------------------------------------------------------------------------------------------
# the page


def as_json(data):
    """JSON that may stand inside a <script>: ASCII, without "<"; lone surrogates and U+2028 are escapes."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def runs_in(folder):
    """A run folder → itself. A folder of runs, such as runs/demo → those in it, the oldest first."""
    if Path(folder, "metrics.csv").is_file():
        return [folder]
    inside = [path.parent for path in Path(folder).glob("*/metrics.csv")]
    require(inside, f"{folder}: is no run folder: neither it nor a folder in it has a metrics.csv")
    return sorted(inside, key=lambda run: os.path.getmtime(run / "metrics.csv"))


def render(folders, found=None):
    """Run folders → the text of the page, whose links hold from the first folder.

    found: what the doctor has found in the only run.
    """
    runs = [run for folder in folders for run in runs_in(folder)]
    folder = folders[0]
    data = {
        "runs": [of_run(run, folder, LARGEST // len(runs), found) for run in runs],
        "demo": demo_answers(folder),
        "quantities": [dict(zip(("key", "name", "kind", "meaning"), row)) for row in QUANTITIES],
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    parts = {
        "/*CSS*/": (HERE / "page.css").read_text(encoding="utf-8"),
        "/*JS*/": (HERE / "page.js").read_text(encoding="utf-8"),
        "/*DATA*/": as_json(data),  # the last, as a response may hold one of these marks
    }
    for mark, text in parts.items():
        page = page.replace(mark, text, 1)
    return page


def write(folders, found=None):
    """Write look.html into the first folder → its path. found: as of `render`."""
    path = Path(folders[0], "look.html")
    text = render(folders, found)
    require_plain(folders[0])  # look.html.tmp may be a link to a file of somebody else's
    tmp = path.with_name("look.html.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)  # half a page, on a disk that is full
    return str(path)


def try_write(folder, found=None):
    """`write` of one folder at the end of a run. A page that fails must not lose the rest: a warning."""
    try:
        write([folder], found)
    except doctor.UNREADABLE as e:
        print(f"warning: {folder}/look.html could not be written ({reason_of(e)})")
