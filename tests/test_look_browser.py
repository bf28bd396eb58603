"""The page of a run in a real browser: no network, no error, its numbers, its keys, hostile texts."""

import json
import math
import random
import re

import pytest
from browser import browser, needed
from runs import EACH
from stages import TRAINERS
from test_look import a_run

import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf.errors import visible
from nanorlhf.look import page, plots, tokens
from nanorlhf.run.checkpoint import Run

pytestmark = [pytest.mark.slow, needed]


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture
def opened(window, tmp_path):
    """opened(folders): write their page and open it, 1,600 pixels wide → the window."""

    def open_page(*folders):
        window.look(1600)
        window.log("browser")
        window.log("performance")
        window.open(page.write(folders))
        assert window.run("return document.getElementById('next').disabled"), "it opens at the last step"
        window.run("show(0)")
        return window

    return open_page


COLOURS = "return [...document.querySelectorAll('.t')].map((x) => x.style.backgroundColor)"


def errors(window):
    return [line["message"] for line in window.log("browser")]


def requests(window):
    """Addresses that the page has asked for, its own first."""
    events = [json.loads(line["message"])["message"] for line in window.log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [e["request"]["url"] for e in sent if e["documentURL"].startswith("file:")]  # no tab of Chromium's


def shown(window):
    """What the box of the chosen token says: {name of a formula: its text}."""
    names, texts = window.run("""const all = (tag) => [...document.querySelectorAll("#token " + tag)];
        return [all("dt").map((x) => x.textContent), all("dd").map((x) => x.textContent)]""")
    return dict(zip(names, texts))


def result(text):
    """The number behind the last "=" of a formula."""
    return float(re.findall(r"= (−?[\d.e−]+)", text)[-1].replace("−", "-"))


def choose(window, row, t):
    window.run(f"document.querySelector('.t[data-row=\"{row}\"][data-t=\"{t}\"]').click()")


def test_it_opens_from_disk_and_a_click_changes_what_is_shown(opened, tmp_path):
    run = a_run(tmp_path / "run", 20, [0, 5, 10, 19], 16, 200)
    records = tokens.read(run)
    window = opened(run)
    assert errors(window) == []
    (own,) = requests(window)
    assert own == f"file://{run}/look.html"
    names = {"reward": "reward", "surprise": "delta", "advantage": "adv_raw", "return": "ret"}
    names["whitened"] = "adv"
    seen = set()
    for step in (0, 1):
        for row, j in ((0, 0), (3, 7), (15, 199)):  # 199: the last token, behind which nothing is expected
            choose(window, row, 10 + j)
            box = shown(window)
            seen.add(json.dumps(box))
            data = records[step]["rows"][row]
            for name, key in names.items():
                assert result(box[name]) == data[key][j], (name, box[name])
            (rho,) = [text for name, text in box.items() if name.startswith("ratio")]
            assert result(rho) == data["ratio"][0][j]
            assert result(box["value"]) == data["old_value"][j]
        window.run("document.getElementById('next').click()")
    assert len(seen) == 6
    # the same spans in other colours: nothing is built anew
    window.run("window.before = [...document.querySelectorAll('.t')]")
    first = window.run(COLOURS)
    window.run("""const select = document.getElementById("quantity"); select.value = "delta";
        select.dispatchEvent(new Event("change"))""")
    assert window.run(COLOURS) != first
    assert window.run("return window.before.every((x, i) => x === document.querySelectorAll('.t')[i])")
    assert len(first) == 16 * 210
    # a click on a curve goes to the nearest logged step
    window.run("""const svg = document.querySelectorAll("figure svg")[2], box = svg.getBoundingClientRect();
        const at = {clientX: box.right - 8, clientY: box.top + 9, bubbles: true};
        svg.dispatchEvent(new MouseEvent("click", at))""")
    assert window.run("return document.getElementById('step-name').textContent") == "19 (4 of 4)"
    assert errors(window) == [] and requests(window) == []


def test_axes(opened, tmp_path):
    """A KL of 1e-7 at step 0 makes no logarithmic axis, nor a share of 0 one that goes below 0."""
    window = opened(a_run(tmp_path / "run", 3, [0], 1, 5))
    found = window.run("""const first = ({ log, ticks }) => [log, ticks[0]];
        return [["kl", [1e-7, 0.4]], ["kl", [1e-7, 30]], ["loss", [0.01, 6]], ["dead", [0, 0]]]
            .map(([name, values]) => first(axis(name, values)))""")
    assert found == [[False, 0.1], [True, 0], [True, 0.01], [False, 0]]


def test_the_keyboard_alone_reaches_all(opened, tmp_path):
    window = opened(a_run(tmp_path / "run", 20, [0, 5, 19], 4, 30))
    focus = "const e = document.activeElement; return e.id || e.dataset.name || e.dataset.t || e.textContent"
    met = []
    for _ in range(80):
        window.keys("tab")
        met.append(window.run(focus))
        if met[-1] == "10":  # the one token that Tab stops at, the first that was sampled
            break
    assert {"step", "next", "reward", "kl", "quantity", "update"} <= set(met)
    before = shown(window)
    window.keys("right")
    assert window.run(focus) == "11" and shown(window) != before
    before = shown(window)
    window.keys("down")
    assert window.run("return document.activeElement.dataset.row") == "1" and shown(window) != before
    step = "return document.getElementById('step-name').textContent"
    window.keys("right", held="shift")
    assert window.run(step) == "5 (2 of 3)" and window.run("return document.activeElement.dataset.row") == "1"
    window.keys("tab")
    assert "train_ppo.py:" in window.run(focus), "behind the token stand the links of its formulas"
    window.run("document.activeElement.blur()")
    window.keys("right")
    assert window.run(step) == "19 (3 of 3)"
    named = """return [...document.querySelectorAll("button, select, input, figure, [role=group]")]
        .filter((e) => !(e.getAttribute("aria-label") || e.textContent || e.closest("label"))).length"""
    assert window.run(named) == 0


# ------------------------------------------------------------------------------------------------------------
# real runs of all trainers


@pytest.fixture(scope="module")
def real(stages, tmp_path_factory):
    """{trainer: its run folder, {step: what it gave Run.rollout}}: a short run of each."""
    rollout = Run.rollout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "pyplot", lambda: None)
        patch.setattr(tokens, "SHARE", math.inf)
        found = {}
        for trainer in TRAINERS:
            tensors = {}

            def spied(run, step, roll, policy, batch, tensors=tensors, **others):
                tensors[step] = {name: x.clone() for name, x in (batch | others).items() if hasattr(x, "dim")}
                return rollout(run, step, roll, policy, batch, **others)

            patch.setattr(Run, "rollout", spied)
            folder = tmp_path_factory.mktemp("real") / trainer.__name__
            flags = dict(sample_every=2) if hasattr(trainer.Config, "sample_every") else dict(eval_every=2)
            trainer.train(stages.config(trainer, folder, **flags))
            found[trainer] = folder, tensors
    return found


# What the box calls a number of a token → its key in tokens.jsonl.gz.
OF_A_TOKEN = {"log-prob": "logp", "entropy": "entropy"}
OF_A_SAMPLE = {"log-prob": "old_logp", "entropy": "entropy"}
OF_A_SAMPLE |= {"log-ratio": "log_ratio", "weight in the loss": "w"}
OF_PPO = {"reward": "reward", "value": "old_value", "surprise": "delta"}
OF_PPO |= {"advantage": "adv_raw", "whitened": "adv", "return": "ret"}
IN_BOX = {
    train_sft: OF_A_TOKEN,
    train_rm: {"score if the response ended here": "value"},
    train_ppo: OF_A_SAMPLE | OF_PPO,
    train_grpo: OF_A_SAMPLE | {"advantage, of the whole response": "adv"},
    train_dpo: OF_A_TOKEN | {"log-ratio": "log_ratio", "of the whole response": "h"},
    train_distill: OF_A_SAMPLE | {"divergence, the loss": "divergence", "KL(student‖teacher)": "kl"},
}
# Those that a tensor of the trainer holds, (B, T) or (B,), under the same name.
TENSORS = {"log-prob", "reward", "value", "whitened", "return", "advantage, of the whole response"}


def number(text):
    """The number that a text begins with, else the one behind its last "="."""
    first = re.match(r"(−?[\d.e−]+) ", text)
    return float(first[1].replace("−", "-")) if first else result(text)


def click(window, element):
    window.run(f"document.getElementById('{element}').click()")


STEP = "return document.getElementById('step-name').textContent"
QUANTITY = """const select = document.getElementById("quantity"); select.selectedIndex = arguments[0];
    select.dispatchEvent(new Event("change"))"""


@EACH
def test_the_box_has_the_trainers_numbers(trainer, real, opened):
    """Of the first, a middle and the last token of three rows at each logged step, in all digits."""
    folder, tensors = real[trainer]
    records = [record for record in tokens.read(folder) if "rows" in record]
    assert len(records) >= 3
    window = opened(folder)
    seen = set()
    for record in records:
        rows = record["rows"]
        for i in (0, len(rows) // 2, len(rows) - 1):
            row = rows[i]
            sampled = [t for t, bit in enumerate(row["mask"]) if bit == "1"]
            for j in {0, len(sampled) // 2, len(sampled) - 1}:
                choose(window, i, sampled[j])
                box = shown(window)
                seen.add(json.dumps(box))
                for name, key in IN_BOX[trainer].items():
                    value = row[key]
                    value = value[j] if isinstance(value, list) else value
                    assert number(box[name]) == value, (record["step"], i, j, name, box[name])
                    if name in TENSORS and tensors:
                        x = tensors[record["step"]][key]
                        x = x[i] if x.dim() == 1 else x[i, sampled[j]]
                        assert number(box[name]) == float(f"{x.item():.4g}"), (record["step"], i, j, name)
                for name, text in box.items():
                    if name.startswith("ratio"):
                        assert number(text) == row["ratio"][row["update"][0]][j]
        click(window, "next")
    assert len(seen) > 3 * len(records), "another token, or another step, is another text"
    assert errors(window) == [] and len(requests(window)) == 1


@EACH
def test_clicks_and_keys_on_each_kind_of_page(trainer, real, opened):
    folder, _ = real[trainer]
    window = opened(folder)
    # all that can have the focus gets it by Tab, in the order in which it stands
    window.run("""const can = "a[href], button:enabled, select, input, summary, [tabindex='0']";
        const seen = [...document.querySelectorAll(can)].filter((e) => e.getClientRects().length);
        window.can = seen.map((e) => e.outerHTML);
        window.met = [];
        document.addEventListener("focusin", (e) => window.met.push(e.target.outerHTML));""")
    window.keys(*["tab"] * window.run("return window.can.length"))
    assert window.run("return window.met") == window.run("return window.can")
    # each quantity has colours, and another one has others
    before = str(window.run(COLOURS))
    pictures = set()
    for i in range(window.run("return document.getElementById('quantity').length")):
        window.run(QUANTITY, i)
        pictures.add(str(window.run(COLOURS)))
        assert window.run("return document.getElementById('scale').textContent") != ""
    assert len(pictures) >= 2 or trainer is train_rm
    assert before in pictures
    window.run("document.getElementById('quantity').focus()")
    before = window.run("return document.getElementById('quantity').value")
    window.keys("up")
    assert window.run("return document.getElementById('quantity').value") != before
    # steps: by a click on a curve, by the slider, by the keys
    first = window.run(STEP)
    at = """const svg = document.querySelector("figure svg"), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new MouseEvent("click", {clientX: box.left + arguments[0] * box.width,
            clientY: box.top + 9, bubbles: true}))"""
    window.run(at, 0.98)
    last = window.run(STEP)
    assert last != first and window.run("return document.getElementById('next').disabled")
    window.run(at, 0.15)
    assert window.run(STEP) == first
    window.run("document.getElementById('step').focus()")
    window.keys("right")
    assert window.run(STEP) not in (first, last)
    # tokens: another one by the keys, another row, another step
    window.run("document.querySelector(\".t[tabindex='0']\").focus()")
    texts = [shown(window)]
    at_step = window.run(STEP)
    for key, held in (("right", None), ("down", None), ("right", "shift")):
        window.keys(key, held=held)
        texts.append(shown(window))
        assert texts[-1] != texts[-2], key
    assert window.run(STEP) != at_step
    assert errors(window) == [] and len(requests(window)) == 1


# ------------------------------------------------------------------------------------------------------------
# pages that no default run leaves


def a_grpo_run(folder, rows, **others):
    """The files of a GRPO run of a single step, whose record has these rows."""
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,ratio_max\n0,1\n")
    flags = {"kl": "none", "loss": "clip", "clip_low": 0.2, "clip_high": 0.2, "norm": "group_std"}
    flags["std_eps"] = 0
    (folder / "config.json").write_text(json.dumps(flags))
    for i, row in enumerate(rows):
        row |= {"ids": [1, 2, 3], "text": ["a", "b", "c"], "mask": "011", "old_logp": [-1.0, -2.0]}
        row |= {"group": i // 2, "score": row["reward"], "finished": True, "ratio": [[1.0, 1.1], [1.2, 1.3]]}
    groups = {name: [row[name] for row in rows] for name in ("group", "reward")} | others
    (folder / tokens.FILE).write_bytes(tokens.pack({"step": 0, "rows": rows, "groups": groups}))
    return folder


def test_a_step_of_grpo_with_equal_rewards(opened, tmp_path):
    """All groups are dead, every list has one number: the page still shows each of them."""
    rows = [{"reward": 1.0, "adv": 0.0, "update": [0], "w": [0.25, 0.25]} for _ in range(6)]
    window = opened(a_grpo_run(tmp_path / "run", rows, adv=[0.0] * 6, score=[1.0] * 6))
    cards = window.run("return [...document.querySelectorAll('.group p')].map((x) => x.textContent)")
    assert cards == [f"prompt {i}: dead, all 2 rewards are 1" for i in range(3)]
    assert "(1 − 1) / (0 + 0) = 0" in shown(window)["advantage, of the whole response"]
    assert errors(window) == []


def test_advantages_of_each_token_in_grpo(opened, tmp_path):
    """As of some variants: there is no formula of the whole response. Nor a ratio after update 16."""
    rows = [{"reward": i / 4, "adv": [0.5, -0.25], "update": [16], "w": [0.25, None]} for i in range(4)]
    del rows[1]["update"]
    window = opened(a_grpo_run(tmp_path / "run", rows, score=[0.0] * 4))
    for row in (1, 2):
        choose(window, row, 2)
        box = shown(window)
        assert box["advantage"].startswith("A_t = −0.25") and "weight in the loss" not in box
        assert not [name for name in box if name.startswith("ratio")]
    assert errors(window) == []


@pytest.mark.parametrize("loss, said", [
    ("dpo", "pair 0: h_w 1, h_l −2, margin 0.3."), ("simpo", "pair 0: chosen −1.5, rejected −1.5"),
    ("orpo", "pair 0: chosen −1.5, rejected −1.5"), ("kto", "response 1, disliked: h −2"),
])  # fmt: skip
def test_pairs_under_each_loss(opened, tmp_path, loss, said):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step,logp_chosen\n0,1\n")
    (run / "config.json").write_text(json.dumps({"beta": 0.1, "loss": loss, "label_smoothing": 0}))
    rows = []
    for i, (side, h) in enumerate([("chosen", 1.0), ("rejected", -2.0)]):
        row = {"ids": [1, 2, 3], "text": ["a", "b", "c"], "mask": "011", "logp": [-1.0, -2.0], "h": h}
        row |= {"log_ratio": [h, 0.0], "ref_logp": [-1.0, -2.0], "finished": True}
        rows.append(row | {"side": side, "pair": i if loss == "kto" else 0})
    record = {"step": 0, "rows": rows, "z0": 0.5 if loss == "kto" else None}
    (run / tokens.FILE).write_bytes(tokens.pack(record))
    window = opened(run)
    texts = window.run("return [...document.querySelectorAll('#groups .list p')].map((x) => x.textContent)")
    assert any(text.startswith(said) for text in texts), texts
    choose(window, 1, 1)
    box = shown(window)
    assert ("of the pair" in box) == (loss == "dpo")
    assert ("of its tokens" in box) == (loss in ("simpo", "orpo"))
    assert loss != "kto" or box["z₀, what h is held against"].strip() == "0.5"
    assert errors(window) == []


def test_another_run_keeps_the_step_and_a_click_holds_the_token(opened, tmp_path):
    """Run a has logged steps 0, 5, 10 and 19, run b 0 and 10: step 10 is the third of a, the second of b."""
    other = a_run(tmp_path / "b", 20, [0, 10], 2, 20)
    window = opened(a_run(tmp_path / "a", 20, [0, 5, 10, 19], 2, 20), other)
    name = "return document.getElementById('step-name').textContent"
    window.run("show(2)")
    assert window.run("return document.title") == "a · nanoRLHF"
    window.run("""const select = document.getElementById("run"); select.value = "1";
        select.dispatchEvent(new Event("change"))""")
    assert window.run(name) == "10 (2 of 2)" and window.run("return document.title") == "b · nanoRLHF"
    point = """document.querySelector(`.t[data-row="0"][data-t="${arguments[0]}"]`).dispatchEvent(
        new MouseEvent("mouseover", {bubbles: true}))"""
    window.run(point, 12)
    first = shown(window)
    window.run(point, 13)
    assert shown(window) != first
    choose(window, 0, 12)
    window.run(point, 13)
    assert shown(window) == first, "the clicked one stays"
    choose(window, 0, 13)
    window.run(point, 12)
    assert shown(window) != first
    choose(window, 0, 13)  # the second click on it lets go
    window.run(point, 12)
    assert shown(window) == first and errors(window) == []


PIECES = [
    "<script>window.hacked = 1</script>", "</script><script>window.hacked = 1</script>", "<!--", "-->", "]]>",
    "<img src=x onerror='window.hacked=1'>", "'\"`", "${1}", "&lt;&amp;", "\x00", "\x1b[31m", "\r", "\u2028",
    "\u202eabc", "\u2066", "\ud800", "\udc00", "\x7f", "é", "😀", "/*JS*/", "/*DATA*/", "\\u003c", "\n", "\t",
    "<b>", "{", "\ufffd", "\u200f", "$&",
]  # fmt: skip


def test_200_hostile_responses_are_shown_literally(opened, tmp_path):
    rng = random.Random(0)
    run = a_run(tmp_path / "run", 5, [], 0, 0)
    written = []
    with open(run / tokens.FILE, "wb") as f:
        for step in range(13):
            rows = []
            for _ in range(16):
                texts = [rng.choice(PIECES) for _ in range(12)]
                row = {"ids": list(range(12)), "text": texts, "mask": "0" + "1" * 11, "old_logp": [-1.0] * 11}
                rows.append(row)
            written.append(rows)
            f.write(tokens.pack({"step": step, "rows": rows}))
        answers = [{"prompt": p, "response": p[::-1]} for p in PIECES]
        for step in (0, 5):
            f.write(tokens.pack({"step": step, "held_out": answers}))
    (run / "config.json").write_text(json.dumps({"reward": PIECES, "clip": 0.2}))
    window = opened(run)
    for rows in written:
        found = window.run("""return [...document.querySelectorAll(".strip")].map((strip) =>
            [...strip.querySelectorAll(".t")].map((t) => t.textContent))""")
        for texts, row in zip(found, rows, strict=True):
            assert texts == [visible(t).replace("\n", "↵\n").replace("\t", "⇥") for t in row["text"]]
        window.run("document.getElementById('next').click()")
    cards = window.run("return [...document.querySelectorAll('.answers .prompt')].map((x) => x.textContent)")
    assert cards == [visible(text) for text in PIECES[: tokens.HELD_OUT]]
    assert window.run("return [typeof window.hacked, document.images.length, document.scripts.length]") == [
        "undefined", 0, 2]  # fmt: skip
    assert errors(window) == [] and len(requests(window)) == 1


@pytest.mark.parametrize("width", [380, 1600])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_stands_beyond_the_edge(opened, tmp_path, width, dark):
    """No sideways scrolling, and letters of every colour of token have a contrast of 4.5 to 1 (WCAG AA)."""
    window = opened(a_run(tmp_path / "run", 20, [0, 19], 16, 60))
    window.look(width, dark=dark)
    window.run("document.querySelector('#flags').open = true")
    beyond = """const wide = document.documentElement.clientWidth;
        return [...document.querySelectorAll("main *, header *")].filter((e) => !e.closest(".scroll, svg") &&
            e.getBoundingClientRect().right > wide + 1).map((e) => e.outerHTML.slice(0, 80))"""
    assert window.run(beyond) == []
    contrast = """const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
        const light = (c) => { const [r, g, b] = c.map((x) => (x /= 255) <= 0.04045 ? x / 12.92 :
            ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const page = rgb(getComputedStyle(document.body).backgroundColor);
        return Math.min(...[...document.querySelectorAll(".t:not(.prompt)")].map((e) => {
            const style = getComputedStyle(e), [r, g, b, alpha = 1] = rgb(style.backgroundColor);
            const behind = light([r, g, b].map((x, i) => alpha * x + (1 - alpha) * page[i]));
            const text = light(rgb(style.color));
            return (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05); }))"""
    assert window.run(contrast) >= 4.5
