"""The six drawn figures of the pages: docs/img/*.svg, from plain strings. Every number in them is computed.

    python bench/diagrams.py

Width 880, which is what GitHub shows, letters of 13 to 16 pixels, on white paper also in dark mode.
"""

import math
import sys
from html import escape
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train_grpo import Config, policy_loss  # noqa: E402
from train_ppo import gae  # noqa: E402

IMG = ROOT / "docs/img"
WIDTH = 880
INK, GREY, PALE = "#1b1f24", "#6e7781", "#eef1f4"
BLUE, ORANGE, RED, GREEN = "#0969da", "#b35900", "#cf222e", "#1a7f37"
LIGHT_BLUE, LIGHT_ORANGE, LIGHT_RED, LIGHT_GREEN = "#ddf0ff", "#ffe8d1", "#ffdcd9", "#dcf5e1"


class Paper:
    """A picture that shapes are added to."""

    def __init__(self, height, about):
        self.height = height
        self.about = about
        self.parts = []

    def add(self, tag, content="", **attributes):
        words = " ".join(f'{name.replace("_", "-")}="{_short(x)}"' for name, x in attributes.items())
        self.parts.append(f"<{tag} {words}>{content}</{tag}>" if content else f"<{tag} {words}/>")

    def text(self, x, y, words, size=15, fill=INK, anchor="middle", weight="normal"):
        """Lines of words, the first one's baseline at y."""
        for i, line in enumerate(words.split("\n")):
            letters = dict(font_size=size, fill=fill, text_anchor=anchor, font_weight=weight)
            self.add("text", escape(line), x=x, y=y + i * size * 1.3, **letters)

    def box(self, x, y, w, h, fill=PALE, stroke=GREY, r=4, **more):
        self.add("rect", x=x, y=y, width=w, height=h, rx=r, fill=fill, stroke=stroke, **more)

    def line(self, points, stroke=GREY, width=1.5, arrow=False, dash=""):
        path = "M" + " L".join(f"{_short(x)} {_short(y)}" for x, y in points)
        more = {"stroke_dasharray": dash} if dash else {}
        self.add("path", d=path, fill="none", stroke=stroke, stroke_width=width, **more)
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            angle = math.atan2(y - y0, x - x0)
            wings = [(x - 9 * math.cos(angle + t), y - 9 * math.sin(angle + t)) for t in (0.42, -0.42)]
            corners = " ".join(f"{_short(a)},{_short(b)}" for a, b in ((x, y), *wings))
            self.add("polygon", points=corners, fill=stroke)

    def svg(self):
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
        head += f'height="{self.height}" font-family="Helvetica, Arial, sans-serif" role="img">'
        paper = f'<rect width="{WIDTH}" height="{self.height}" rx="8" fill="#ffffff"/>'
        return "\n".join([head, f"<title>{escape(self.about)}</title>", paper, *self.parts, "</svg>\n"])


def _short(x):
    return f"{x:.1f}".removesuffix(".0") if isinstance(x, float) else x


def number(x):
    return f"{x:.2f}".replace("-", "−")


# ------------------------------------------------------------------------------------------------------------
# the figures


def pipeline():
    """From prompt to update, with the shape of what flows and the file that makes it."""
    p = Paper(352, "From prompts to an update: what flows, its shape, and where it is made")
    steps = [
        ("prompts", "lists of tokens", "tasks.py, data.py", LIGHT_BLUE),
        ("rollout", "tokens, mask,\nold_logp (B, T)", "generate.py", LIGHT_BLUE),
        ("reward", "score (B,)", "rewards.py", LIGHT_BLUE),
        ("advantage", "(B,) or (B, T)", "the trainer", LIGHT_ORANGE),
        ("loss", "over the mask,\none number", "the trainer", LIGHT_ORANGE),
        ("update", "one optimizer step,\none row of the log", "the trainer", LIGHT_ORANGE),
    ]
    wide, gap, top = 124, 20, 96
    left = (WIDTH - 6 * wide - 5 * gap) / 2
    for i, (name, flows, where, fill) in enumerate(steps):
        x = left + i * (wide + gap)
        p.box(x, top, wide, 100, fill)
        p.text(x + wide / 2, top + 27, name, 17, weight="bold")
        p.text(x + wide / 2, top + 52, flows, 12.5)
        p.text(x + wide / 2, top + 90, where, 12.5, BLUE if fill == LIGHT_BLUE else ORANGE)
        if i:
            p.line([(x - gap, top + 50), (x - 1, top + 50)], INK, arrow=True)
    middle = [left + i * (wide + gap) + wide / 2 for i in range(6)]
    p.line([(middle[5], top), (middle[5], 44), (middle[1], 44), (middle[1], top - 1)], INK, arrow=True)
    p.text((middle[1] + middle[5]) / 2, 34, "the next rollout is sampled with the new weights")
    for i, name, words in (
        (2, "reward model, or a checker", "scores each response"),
        (3, "critic (PPO), or the group (GRPO)", "what was to be expected"),
        (4, "reference model", "the KL, here or in the reward"),
    ):
        x = middle[3] + (i - 3) * 256 - 30
        p.line([(x, 244), (middle[i], top + 101)], GREY, arrow=True)
        p.box(x - 122, 244, 244, 56)
        p.text(x, 267, name, 14, weight="bold")
        p.text(x, 288, words, 13)
    p.text(left, 334, "blue: shared package", 13, BLUE, "start")
    p.text(WIDTH - left, 334, "orange: the algorithm, visible in each trainer", 13, ORANGE, "end")
    return p


def mask():
    """Row 0 of the example in docs/00-notation.md: the shift by one, and which positions count."""
    p = Paper(338, "One row of tokens: the mask, and the hidden state that predicts each token")
    tokens = [*"697470=|3", "EOS", "pad", "pad", "pad"]
    inside = range(7, 10)
    left, cell = 118, 56

    def x(t):
        return left + t * cell + cell / 2

    rows = {"t": 44, "tokens": 76, "hidden state": 150, "logp": 232, "mask": 274}
    for name, y in rows.items():
        p.text(left - 14, y + 5, name, 15, anchor="end", weight="bold")
    for t, token in enumerate(tokens):
        fill = LIGHT_BLUE if t < 7 else LIGHT_GREEN if t in inside else PALE
        p.text(x(t), rows["t"] + 5, str(t), 14, GREY)
        p.box(x(t) - 25, rows["tokens"] - 16, 50, 32, fill)
        p.text(x(t), rows["tokens"] + 5, token, 15, GREY if token == "pad" else INK)
        p.text(x(t), rows["mask"] + 5, str(int(t in inside)), 15, GREEN if t in inside else GREY)
        if token != "pad":
            p.line([(x(t), rows["tokens"] + 17), (x(t), rows["hidden state"] - 18)], GREY, 1, arrow=True)
            p.add("circle", cx=x(t), cy=rows["hidden state"], r=17, fill="#ffffff", stroke=GREY)
            p.text(x(t), rows["hidden state"] + 5, f"h{t}", 13)
        value = f"logp[{t}]" if t in inside else "0"
        colours = (LIGHT_GREEN, GREEN) if t in inside else ("#ffffff", PALE)
        p.box(x(t) - 27, rows["logp"] - 16, 54, 32, *colours)
        p.text(x(t), rows["logp"] + 5, value, 12.5 if t in inside else 14, INK if t in inside else GREY)
        if t in inside:
            start = (x(t - 1) + 11, rows["hidden state"] + 13)
            p.line([start, (x(t) - 9, rows["logp"] - 18)], GREEN, 2, arrow=True)
    p.text(x(3), 22, "prompt", 14, BLUE)
    p.text(x(8), 22, "response, EOS included", 14, GREEN)
    p.text(x(11), 22, "padding", 14, GREY)
    p.text(x(3), 203, "The state at t − 1 has read tokens 0 … t − 1 and predicts token t.", 13.5)
    words = "logp[t] stands where its token stands. Outside the mask every per-token tensor is 0."
    p.text(WIDTH / 2, 316, words, 14)
    return p


def strip():
    """GAE on four tokens, by the trainer's own function."""
    gamma, lam = 1.0, 0.95
    reward = torch.tensor([[-0.02, -0.05, 0.01, 0.97]])
    value = torch.tensor([[0.40, 0.55, 0.30, 0.70]])
    adv, ret = gae(reward, value, torch.ones(1, 4, dtype=torch.bool), gamma, lam)
    after = torch.cat([value[:, 1:], torch.zeros(1, 1)], 1)
    delta = reward + gamma * after - value
    p = Paper(404, "GAE on a strip of four tokens: deltas forward, advantages backward")
    left, cell = 214, 158
    names = ["<", "6", "|", "EOS"]
    rows = [
        ("r", "reward: −β·k1,\nthe score on the last", reward, PALE),
        ("V", "critic, before the token", value, LIGHT_BLUE),
        ("δ = r + γV′ − V", "V′: the next V, 0 behind EOS", delta, LIGHT_ORANGE),
        ("A = δ + γλA′", "from right to left", adv, LIGHT_GREEN),
        ("R = A + V", "what the critic learns", ret, LIGHT_BLUE),
    ]
    for t, name in enumerate(names):
        p.text(left + t * cell + 60, 36, f"t = {t}:  {name}", 15, weight="bold")
    for i, (name, words, values, fill) in enumerate(rows):
        y = 56 + i * 66
        p.text(24, y + 18, name, 15, anchor="start", weight="bold")
        p.text(24, y + 35, words, 12, GREY, "start")
        for t in range(4):
            p.box(left + t * cell, y, 120, 36, fill)
            p.text(left + t * cell + 60, y + 24, number(values[0, t].item()), 16)
        for t in range(3):
            here, there = left + t * cell + 120, left + (t + 1) * cell
            if name.startswith("A"):
                p.line([(there, y + 18), (here + 1, y + 18)], GREEN, 2, arrow=True)
                p.text((here + there) / 2, y + 10, "γλ", 13, GREEN)
            elif name == "V":
                p.line([(there, y + 30), (here - 12, y + 65)], BLUE, 1.5, arrow=True)
    words = f"γ = {gamma:g}, λ = {lam:g}. λ = 0: A = δ, one step of the critic. "
    words += "λ = 1: A = Σ r − V, no critic but as a baseline."
    p.text(WIDTH / 2, 388, words, 13.5)
    return p


def corners():
    """The clipped objective against the ratio, for both signs of the advantage."""
    p = Paper(392, "The four corners of the clip: where the gradient is 0 and where it is not")
    cfg = Config(task="chain")
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    ratios = [0.5 + i / 100 for i in range(101)]
    for panel, sign in enumerate((1.0, -1.0)):
        left, top, wide, tall = 60 + panel * 425, 62, 360, 240

        def at(ratio, objective, left=left, top=top, wide=wide, tall=tall, sign=sign):
            height = (objective * sign - 0.4) / 1.2 * sign
            return left + (ratio - 0.5) * wide, top + (tall - height * tall if sign > 0 else -height * tall)

        one = torch.ones(1, 1)
        ends = []
        for ratio in ratios:
            logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
            loss, _ = policy_loss(logp, 0 * one, None, sign * one, one.bool(), one, cfg)
            (slope,) = torch.autograd.grad(loss, logp)
            ends.append((ratio, -loss.item(), slope.abs().item() < 1e-9))
        for edge in (low, high):
            p.line([at(edge, sign * 0.4), at(edge, sign * 1.6)], GREY, 1, dash="4 4")
        p.line([at(0.5, sign * 0.5), at(1.5, sign * 1.5)], GREY, 1, dash="2 4")
        for flat, colour in ((False, GREEN), (True, RED)):
            pieces = [at(r, o) for r, o, is_flat in ends if is_flat == flat]
            p.line(pieces, colour, 4)
        p.box(left, top, wide, tall, "none")
        title = "A > 0: more of this token" if sign > 0 else "A < 0: less of this token"
        p.text(left + wide / 2, top - 34, title, 16, weight="bold")
        p.text(left + wide / 2, top - 12, "objective min(ρA, clip(ρ)A)", 13, GREY)
        for ratio in (0.5, low, 1.0, high, 1.5):
            p.text(at(ratio, sign)[0], top + tall + 20, f"{ratio:g}", 13)
        p.text(left + wide / 2, top + tall + 42, "ratio ρ = π / π_old", 14)
        words = ("gradient kept:\ntoo rare, can\ncome back", "gradient 0:\nfar enough") if sign > 0 else (
            "gradient 0:\nfar enough", "gradient kept:\ntoo frequent,\ncan come back")  # fmt: skip
        colours = (GREEN, RED) if sign > 0 else (RED, GREEN)
        heights = (60, 150) if sign > 0 else (180, 30)
        for x, text, colour, y in zip((low - 0.15, high + 0.15), words, colours, heights):
            p.text(at(x, sign)[0], top + y, text, 13, colour)
    words = f"ε = {cfg.clip_low:g}. Dotted: ρA without the clip. "
    words += "The clip never stops a step that undoes one that went too far."
    p.text(WIDTH / 2, 378, words, 13.5)
    return p


def two_kls():
    """One Gaussian fitted to a reference of two humps by either KL."""
    p = Paper(410, "KL(π‖π_ref) chooses a hump, KL(π_ref‖π) covers both")
    x = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    width = x[1] - x[0]

    def normal(mean, sd):
        return torch.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))

    def kl(a, b):
        return ((a * (a.clamp(min=1e-300) / b.clamp(min=1e-300)).log()).sum() * width).item()

    ref = 0.6 * normal(-2.5, 0.9) + 0.4 * normal(2.5, 0.9)
    grid = [(mean / 20, sd / 20) for mean in range(-70, 71) for sd in range(12, 80)]
    found = {
        "reverse": min(grid, key=lambda at: kl(normal(*at), ref)),
        "forward": min(grid, key=lambda at: kl(ref, normal(*at))),
    }
    left, base, wide, tall = 40, 300, 800, 260

    def curve(density, colour, thick, fill="none"):
        points = [(left + (x[i].item() + 7) / 14 * wide, base - density[i].item() / 0.46 * tall)
                  for i in range(200, 1601, 8)]  # fmt: skip
        if fill != "none":
            path = "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in points) + "Z"
            p.add("path", d=path, fill=fill, stroke="none")
        p.line(points, colour, thick)

    curve(ref, GREY, 2, PALE)
    p.line([(left, base), (left + wide, base)], INK, 1)
    for name, colour in (("reverse", ORANGE), ("forward", BLUE)):
        curve(normal(*found[name]), colour, 3)
    p.text(left + wide * 0.68, 280, "π_ref", 16, GREY, weight="bold")
    reverse, forward = (normal(*found[name]) for name in ("reverse", "forward"))
    p.text(left + wide * 0.46, 60, "π that minimises KL(π‖π_ref)", 16, ORANGE, "start", "bold")
    words = "PPO, GRPO, DPO, distillation by default: it stays where π_ref is,\n"
    words += "and may leave out what π_ref writes as well"
    p.text(left + wide * 0.46, 82, words, 13.5, anchor="start")
    p.text(left + wide * 0.62, 140, "π that minimises KL(π_ref‖π)", 16, BLUE, "start", "bold")
    words = "SFT, --divergence forward: it covers\nall that π_ref writes, and the gap"
    p.text(left + wide * 0.62, 162, words, 13.5, anchor="start")
    p.text(left, base + 30, "texts →", 14, GREY, "start")
    p.text(570, base + 44, "KL(π‖π_ref)", 14, weight="bold")
    p.text(720, base + 44, "KL(π_ref‖π)", 14, weight="bold")
    for k, (name, density, colour) in enumerate((("orange", reverse, ORANGE), ("blue", forward, BLUE))):
        y = base + 70 + k * 24
        p.text(420, y, f"the {name} π", 14, colour, weight="bold")
        p.text(570, y, f"{kl(density, ref):.2f} nats", 14)
        p.text(720, y, f"{kl(ref, density):.2f} nats", 14)
    return p


def tiles():
    """From hidden states to log-probs without the logits."""
    p = Paper(384, "From hidden states to log-probs in tiles: the logits are never stored")
    top, cell, rows, columns = 96, 40, 4, 7
    x0 = 150
    hot_row, hot_column = 0, 6
    p.text(60, top - 16, "x (N, D)", 15, BLUE, weight="bold")
    for i in range(rows):
        colours = (LIGHT_BLUE, BLUE) if i == hot_row else (PALE, GREY)
        p.box(36, top + i * cell, 60, cell - 4, *colours)
    words = "W (V, D): the vocabulary, piece by piece"
    p.text(x0 + columns * cell / 2, 30, words, 15, ORANGE, weight="bold")
    for j in range(columns):
        colours = (LIGHT_ORANGE, ORANGE) if j == hot_column else (PALE, GREY)
        p.box(x0 + j * cell, 42, cell - 4, 30, *colours)
    for i in range(rows):
        for j in range(columns):
            hot = (i, j) == (hot_row, hot_column)
            done = i == hot_row and j < hot_column
            fill = LIGHT_RED if hot else LIGHT_GREEN if done else "#ffffff"
            dashed = {} if hot else {"stroke_dasharray": "3 3"}
            p.box(x0 + j * cell, top + i * cell, cell - 4, cell - 4, fill, RED if hot else GREY, **dashed)
    y = top + hot_row * cell + 18
    p.line([(97, y), (x0 - 2, y)], BLUE, 2, arrow=True)
    x = x0 + hot_column * cell + 18
    p.line([(x, 73), (x, top + hot_row * cell - 2)], ORANGE, 2, arrow=True)
    words = "logits (N, V): only the red tile exists, in fast memory;\n"
    words += "green tiles have been, white ones are to come"
    p.text(x0, top + rows * cell + 22, words, 13.5, anchor="start")
    mid = 500
    p.line([(x + 20, y), (mid - 2, y)], RED, 2, arrow=True)
    p.box(mid, top - 6, 168, 124, LIGHT_RED, RED)
    p.text(mid + 84, top + 16, "of a row and a piece C", 14, weight="bold")
    words = "m = max z\ns = Σ exp(z − m)\nt = Σ exp(z − m)(z − m)\nand z_y, if y is in C"
    p.text(mid + 84, top + 42, words, 13.5)
    end = 706
    p.line([(mid + 169, top + 56), (end - 2, top + 56)], RED, 2, arrow=True)
    p.box(end, top - 6, 150, 124, LIGHT_GREEN, GREEN)
    p.text(end + 75, top + 16, "pieces merged", 14, weight="bold")
    p.text(end + 75, top + 46, "lse = M + log s\nlogp = z_y − lse\nH = log s − t/s", 14)
    p.text(end + 75, top + 146, "two numbers a token,\nin fp32", 13.5, GREEN)
    n, v = 65_536, 151_936
    gib = n * v * 4 / 2**30
    words = f"N = {n:,} tokens and V = {v:,}: the logits would be {gib:.0f} GiB, "
    words += f"the two numbers are {n * 8 / 2**20:.1f} MiB."
    p.text(WIDTH / 2, 336, words, 14)
    words = "Backward, each tile is computed once more: its gradient needs only lse and H of the row."
    p.text(WIDTH / 2, 362, words, 14)
    return p


FIGURES = {
    "pipeline": pipeline,
    "mask": mask,
    "gae": strip,
    "clip": corners,
    "two_kls": two_kls,
    "tiles": tiles,
}


if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (IMG / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
