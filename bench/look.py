"""The page of a run in a browser: pictures for the docs, how fast it changes colours, what writing it costs.

    python bench/look.py            docs/img/look_*.png, from short runs of all trainers: a CPU-minute
    python bench/look.py --all DIR  every page from top to bottom, at both widths, light and dark, to look at
    python bench/look.py --speed    milliseconds in which 16 rows × 200 tokens get another colour
    python bench/look.py --cost [NAME ...]
                                    the share of each trainer's default run that writing for the page takes:
                                    CPU seconds of one thread, so that other programs count little; 5 minutes

All but --cost need Chromium and chromedriver, as tests/browser.py does. The short runs stay in out/look, and
one that is there is not made again; its page is. The default runs of --cost start from their models.
"""

import base64
import contextlib
import csv
import importlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMG, OUT = ROOT / "docs/img", ROOT / "out/look"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import browser  # noqa: E402

from bench import table  # noqa: E402
from nanorlhf.look import doctor, page, tokens  # noqa: E402
from nanorlhf.run import cli  # noqa: E402

# name → the command of a default run; {name} stands for the folder of an earlier one
DEFAULTS = {
    "sft": "train_sft.py",
    "rm": "train_rm.py --init {sft}/model",
    "ppo": "train_ppo.py --init {sft}/model --rm {rm}/model",
    "dpo": "train_dpo.py --init {sft}/model",
    "chain_sft": "train_sft.py --task chain",
    "grpo": "train_grpo.py --init {chain_sft}/model",
    "distill": "train_distill.py --init {chain_sft}/model --teacher {grpo}/model",
}
SHORT = {
    "sft": "--steps 120 --eval_every 30",
    "rm": "--steps 40 --eval_every 10",
    "ppo": "--steps 11",
    "dpo": "--steps 30 --eval_every 10",
    "chain_sft": "",  # GRPO wants nine of ten sums right
    "grpo": "--steps 11",
    "distill": "--steps 6",
}
# The section of the page in each trainer's picture, and which edge of it is that of the window.
SHOWN = {
    "sft": ("curves", "start"),
    "rm": ("groups", "end"),
    "ppo": ("responses", "start"),
    "grpo": ("groups", "end"),
    "dpo": ("groups", "end"),
    "distill": ("responses", "start"),
}
WIDE, NARROW = 1600, 380  # pixels of the window
HIGH = 860
SCALE = 0.6  # of the picture: letters of 15 pixels have 9
COLOURS = 128  # of a picture, which has 120 kB at most


def command(name, folders, more=""):
    """→ the trainer's file, and its flags."""
    trainer, *flags = f"{DEFAULTS[name].format(**folders)} {more}".split()
    return trainer, [*flags, "--out", folders[name], "--threads", "1", "--device", "cpu"]


# ------------------------------------------------------------------------------------------------------------
# pictures


def short_runs():
    """Make the short runs that are missing → {name: folder}."""
    folders = {name: str(OUT / name) for name in DEFAULTS}
    for name, more in SHORT.items():
        trainer, flags = command(name, folders, more)
        if not Path(folders[name], "model").is_dir():
            print(f"{trainer} {more}", flush=True)
            argv = [sys.executable, trainer, *flags, "--overwrite"]
            subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folders


def pages():
    """Write the pages of the short runs anew → {trainer: look.html}."""
    folders = short_runs()
    return {name: page.write([folders[name]]) for name in SHOWN}


def picture(window, scale=1, beyond=False):
    """What the window shows, or all of the page, as PNG."""
    clip = {"x": 0, "y": window.run("return window.scrollY"), "width": window.run("return innerWidth")}
    height = "document.documentElement.scrollHeight" if beyond else "innerHeight"
    clip |= {"height": window.run(f"return {height}"), "scale": scale}
    shot = window.devtools("Page.captureScreenshot", captureBeyondViewport=beyond, clip=clip)
    return base64.b64decode(shot["data"])


def looks():
    """→ (name of the look, width, dark) of each."""
    names = {"wide": WIDE, "narrow": NARROW}
    return [(f"{name}_{'dark' if dark else 'light'}", width, dark)
            for dark in (False, True) for name, width in names.items()]  # fmt: skip


def all_pictures(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browser(profile) as window:
        for name, path in pages().items():
            for look, width, dark in looks():
                window.look(width, HIGH, dark)
                window.open(path)
                target = folder / f"{name}_{look}.png"
                target.write_bytes(picture(window, beyond=True))
                print(target)


def sheets():
    """One picture a trainer: a part of its page at both widths, light above dark."""
    with tempfile.TemporaryDirectory() as profile, browser(profile) as window:
        for name, path in pages().items():
            shots = []
            for _, width, dark in looks():
                window.look(width, HIGH, dark)
                window.open(path)
                section, edge = SHOWN[name]
                window.run(f"document.getElementById('{section}').scrollIntoView({{block: '{edge}'}})")
                shots.append(picture(window, SCALE))
            save_sheet(shots, IMG / f"look_{name}.png")


def save_sheet(shots, path):
    from PIL import Image  # comes with matplotlib

    images = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    gap = 12
    wide, narrow = images[0].width, images[1].width
    high = images[0].height
    sheet = Image.new("RGB", (wide + gap + narrow, 2 * high + gap), "#808080")
    for i, image in enumerate(images):
        sheet.paste(image, ((wide + gap) * (i % 2), (high + gap) * (i // 2)))
    # Of the light and the dark half together the usual method would choose greys only.
    few = sheet.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


# ------------------------------------------------------------------------------------------------------------
# figures


def save_rows(name, rows):
    path = ROOT / f"bench/results/{name}.csv"
    if "run" in rows[0] and path.exists():  # those that were not measured this time stay
        with open(path, newline="") as f:
            rows = list({row["run"]: row for row in [*csv.DictReader(f), *rows]}.values())
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()})
    print(f"{path}; {table.about()['cpu']}")


# Choose each quantity, three times over → [[quantity, milliseconds of the script, until it is drawn], ...].
# The colours are drawn behind the callbacks of the next frame, and before a message arrives that they post.
SWITCH = """
const select = document.getElementById("quantity"), found = [];
const drawn = () => new Promise((done) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = done;
    channel.port2.postMessage(0);
}));
return (async () => {
    for (let round = 0; round < 3; round++) for (const option of select.options) {
        await drawn();
        const start = performance.now();
        select.value = option.value;
        select.dispatchEvent(new Event("change"));
        const script = performance.now() - start;
        await drawn();
        found.push([option.value, script, performance.now() - start]);
    }
    return found;
})();
"""


def main_thread_seconds(window):
    """CPU seconds of the page's thread so far: scripts, styles, layout and paint, whatever else runs here."""
    metrics = window.devtools("Performance.getMetrics")["metrics"]
    return {row["name"]: row["value"] for row in metrics}["TaskDuration"]


def speed():
    from test_look import a_run

    with tempfile.TemporaryDirectory() as tmp, browser(f"{tmp}/profile") as window:
        window.look(WIDE, HIGH)
        window.open(page.write([a_run(Path(tmp, "run"), 20, [0, 19], 16, 200)]))
        assert window.run("return document.querySelectorAll('.t:not(.prompt)').length") == 16 * 200
        window.devtools("Performance.enable", timeDomain="threadTicks")
        before = main_thread_seconds(window)
        found = window.run(SWITCH)
        cpu = main_thread_seconds(window) - before
    rows = [dict(zip(("quantity", "script_ms", "drawn_ms"), row)) for row in found]
    for row in rows:
        row["cpu_ms"] = 1000 * cpu / len(rows)
    for name in ("script_ms", "drawn_ms", "cpu_ms"):
        values = [row[name] for row in rows]
        print(f"{name}: median {statistics.median(values):.0f}, at most {max(values):.0f}, of {len(values)}")
    save_rows("look_speed", rows)


def cost(names):
    """A default run of each trainer in this process, with the time of what writes for the page."""
    spent = []

    def timed(function):
        def wrapper(*args):
            start = time.process_time()
            result = function(*args)
            spent.append(time.process_time() - start)
            return result

        return wrapper

    tokens.time = types.SimpleNamespace(perf_counter=time.process_time)  # TokenLog.seconds is of this clock
    page.try_write = timed(page.try_write)
    doctor.try_findings = timed(doctor.try_findings)
    rows = []
    starts = short_runs()
    with tempfile.TemporaryDirectory() as tmp:
        for name in names:
            file, flags = command(name, starts | {name: f"{tmp}/{name}"})
            trainer = importlib.import_module(file.removesuffix(".py"))
            cfg = cli.parse(trainer.Config, flags)
            spent.clear()
            start = time.process_time()
            with open(f"{tmp}/{name}.txt", "w") as printed, contextlib.redirect_stdout(printed):
                result = trainer.train(cfg)
            row = {"run": name, "run_s": time.process_time() - start, "tokens_s": result.look_s}
            row |= {"page_s": sum(spent), "bytes": Path(cfg.out, tokens.FILE).stat().st_size}
            row["share"] = (row["tokens_s"] + row["page_s"]) / row["run_s"]
            rows.append(row)
            print("  ".join(f"{key} {x:.3g}" if key != "run" else x for key, x in row.items()), flush=True)
    save_rows("look_cost", rows)


def main(argv):
    if argv == ["--speed"]:
        speed()
    elif argv[:1] == ["--cost"] and set(argv[1:]) <= set(SHOWN):
        cost(argv[1:] or list(SHOWN))
    elif argv[:1] == ["--all"] and len(argv) == 2:
        all_pictures(argv[1])
    elif not argv:
        sheets()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
