"""The doctor: each rule on a curve made by hand, the broken runs of docs/broken-runs.md, healthy runs."""

import ast
import csv
import inspect
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf.errors import UserError
from nanorlhf.look import __main__ as look
from nanorlhf.look import doctor
from nanorlhf.look.tokens import pack
from nanorlhf.run import log
from nanorlhf.run.cli import parse, to_json
from nanorlhf.run.folders import read_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import broken_runs  # noqa: E402
import doctor as bench_doctor  # noqa: E402
from curves import rows_of  # noqa: E402

STEPS = 25


def flags(trainer, words=""):
    return to_json(parse(trainer.Config, words.split()))


def curve(start, end):
    """Values of STEPS steps on a straight line."""
    return [start + (end - start) * i / (STEPS - 1) for i in range(STEPS)]


def rows(columns):
    """{column: a number, a (start, end), or a list} → rows as read_rows gives them."""
    full = {}
    for name, x in columns.items():
        if isinstance(x, tuple):
            x = curve(*x)
        full[name] = x if isinstance(x, list) else [x] * STEPS
    return [{"step": i} | {name: x[i] for name, x in full.items()} for i in range(STEPS)]


# Curves of runs without a fault, made by hand: each case below changes what its fault changes.
RL = {
    "reward": (0.4, 0.9), "reward_se": 0.03, "reward_failed": None, "kl": (0.0, 1.0), "entropy": (0.4, 0.1),
    "len": (6.0, 10.0), "stop": 1.0, "dead": (0.0, 0.6), "clip": 0.001, "ratio_max": 1.1, "gap": 1e-6,
    "gnorm": (0.9, 0.3), "tok_s": [256 * x for x in curve(6.0, 10.0)], "s": 1.0,
    "eval/reward": [0.42] + [None] * (STEPS - 2) + [0.9],
}  # fmt: skip
CRITIC = {"explained_var": (0.0, 0.6), "beta": 0.0}
PAIRS = {"loss": (0.693, 0.4), "acc": (0.5, 0.8), "margin": (0.0, 2.0), "gnorm": 2.0,
         "eval/loss": (0.693, 0.4), "eval/acc": (0.5, 0.85)}  # fmt: skip
LENGTHS = {"eval/acc_len_only": 0.52}
SUMS = {"logp_chosen": (-27.0, -30.0), "kl": (0.0, 4.0), "len": 26.0, "stop": 1.0}
SFT = {"loss": (6.7, 1.0), "eval/loss": (6.7, 1.0), "gnorm": 0.7, "len": 900.0}
TEACHER = {"loss": (1.1, 0.05), "kl": (6.0, 0.5), "eval/kl": (6.0, 0.5), "len": 11.0, "stop": 1.0,
           "reward": (0.4, 0.9), "reward_se": 0.03, "entropy": (0.4, 0.1)}  # fmt: skip
HEALTHY = {
    "grpo": (RL, flags(train_grpo)),
    "ppo": (RL | CRITIC | {"dead": None}, flags(train_ppo, "--task chain")),
    "rm": (PAIRS | LENGTHS, flags(train_rm)),
    "dpo": (PAIRS | SUMS, flags(train_dpo)),
    "sft": (SFT, flags(train_sft)),
    "distill": (TEACHER, flags(train_distill)),
}
K1 = "--kl k1 --kl_in reward --beta 0.3"
CASES = [  # rule, healthy curves that it begins with, columns that differ, flags that differ
    ("one_late", "grpo", {"gap": 20.0, "kl": 48.0}, {}),
    ("other_temperature", "grpo", {"gap": 0.3}, {"temperature": 0.6}),
    ("not_as_sampled", "ppo", {"gap": 0.3}, {}),
    ("not_as_sampled", "grpo", {"gap": 0.7}, {"dtype": "bfloat16"}),
    ("not_the_reference", "ppo", {"kl": (0.2, 1.0)}, {}),
    ("not_the_reference", "dpo", {"kl": (0.2, 1.0)}, {}),
    ("no_eos", "grpo", {"tok_s": [256 * (x - 1) for x in curve(6.0, 10.0)]}, {}),
    ("other_prompt", "grpo", {"reward": (0.12, 0.5)}, {}),
    ("half_dead", "grpo", {"dead": 0.6}, {}),
    ("too_large", "grpo", {"clip": 0.15}, {}),
    ("too_large", "ppo", {"ratio_max": 2.5}, {}),
    ("not_log_2", "dpo", {"loss": (0.8, 0.4)}, {}),
    ("too_small", "grpo", {"ratio_max": 1.0004, "kl": 1e-4, "reward": 0.4}, {}),
    ("recomputed", "grpo", {"ratio_max": 1.0}, {}),
    ("k1_in_loss", "grpo", {"kl": (0.0, 1.1)},
     {"kl": "k1", "kl_in": "loss", "kl_unbiased": False, "beta": 3.0}),
    ("kl_sign", "grpo", {"kl": (0.0, 20.0), "len": 22.0, "tok_s": 256 * 22.0},
     {"kl": "k1", "kl_in": "reward", "beta": 0.3}),
    ("kl_sign", "ppo", {"kl": (0.0, 5.0), "beta": 0.3}, {}),
    ("too_short", "grpo", {"reward": (0.4, 0.1), "len": (6.0, 3.0), "entropy": (0.4, 0.7)},
     {"overlong_penalty": 1.0}),
    ("wrong_sign", "grpo", {"reward": (0.4, 0.1), "entropy": (0.4, 0.7)}, {}),
    ("ignored_ratio", "grpo", {"ratio_max": (1.0, 5.0)}, {"loss": "reinforce"}),
    ("stale", "grpo", {"clip": (0.0, 0.2)}, {"off_policy_steps": 8}),
    ("reused", "ppo", {"clip": (0.0, 0.2)}, {}),
    ("not_cleared", "grpo", {"gnorm": (1.6, 1.1)}, {}),
    ("collapsed", "grpo", {"reward": (0.9, 0.1), "entropy": 0.1, "eval/reward": 0.9,
                           "dead": [0.0] * 5 + [1.0] * (STEPS - 5)}, {}),
    ("held_back", "grpo", {"reward": 0.4, "kl": (0.0, 0.04)}, {"kl": "k2", "beta": 3.0}),
    ("held_back", "ppo", {"reward": 0.4, "kl": (0.0, 0.04), "beta": 3.0}, {}),
    ("nothing_to_select", "ppo", {"reward": 0.4, "kl": (0.0, 0.3)}, {}),
    ("nothing_to_select", "grpo", {"reward": 0.4, "kl": (0.0, 0.3)}, {}),
    ("never_ends", "ppo", {"stop": (1.0, 0.3)}, {}),
    ("shrinks", "ppo", {"len": (25.0, 4.0)}, {}),
    ("far_off", "ppo", {"kl": (0.0, 200.0)}, {}),
    ("far_off", "dpo", {"kl": [0.0] + [None] * (STEPS - 2) + [37.0]}, {}),
    ("poor_critic", "ppo", {"explained_var": (0.0, -1.0)}, {}),
    ("reward_fails", "grpo", {"reward_failed": (0.0, 0.3)}, {}),
    ("diverges", "sft", {"loss": (6.7, 9.0)}, {}),
    ("swapped", "dpo", {"acc": (0.5, 0.3)}, {}),
    ("undecided", "rm", {"loss": 0.693, "acc": 0.5}, {}),
    ("memorises", "sft", {"eval/loss": [6.7, *[1.0] * 10, *[1.3] * (STEPS - 11)]}, {}),
    ("only_length", "rm", {"eval/acc": 0.53}, {}),
    ("no_headway", "sft", {"loss": 6.7}, {}),
    ("no_headway", "distill", {"loss": 1.1, "kl": 6.0, "eval/kl": 6.0}, {}),
    ("plateau", "sft", {"loss": (2.8, 1.05)}, {"task": "chain"}),
    ("own_prefixes", "distill", {"eval/kl": (6.0, 5.9)}, {"on_policy": 0.0}),
]  # fmt: skip


def named(found):
    """Findings → names of the rules behind them."""
    rules = {rule.title: rule.shows.__name__ for rule in doctor.RULES}
    return [rules[finding["title"]] for finding in found]


@pytest.mark.parametrize("method", HEALTHY)
def test_curves_without_a_fault(method):
    columns, config = HEALTHY[method]
    assert doctor.diagnose(rows(columns), config) == []


@pytest.mark.parametrize("rule, method, columns, changed", CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_rule(rule, method, columns, changed):
    """It comes first, and a finding has all of its words and fits 80 columns."""
    healthy, config = HEALTHY[method]
    found = doctor.diagnose(rows(healthy | columns), config | changed)
    assert named(found)[:1] == [rule]
    assert found[0].keys() == {"title", "steps", "meaning", "remedy", "page"} and all(found[0].values())
    assert re.match(r"steps? \d+", found[0]["steps"])


def test_baseline_of_other_prompts_in_tokens():
    """Two groups of two. Rewards 1 and 0 give ±0.7 in their own group; dealt in another order they do not."""
    columns, config = HEALTHY["grpo"]
    groups = {"group": [0, 0, 1, 1], "reward": [1.0, 0.0, 1.0, 1.0]}
    own = {"step": 0, "groups": groups | {"adv": [0.707, -0.707, 0.0, 0.0]}}
    other = {"step": 5, "groups": groups | {"adv": [0.707, 0.0, -0.707, 0.0]}}
    assert doctor.diagnose(rows(columns), config, [own]) == []
    opo = {"step": 0, "groups": groups | {"adv": [0.6, -0.4, 0.0, 0.0]}}  # a baseline that is not the mean
    remax = {"step": 0, "groups": groups | {"adv": [1.0, 0.0, 1.0, 1.0]}}  # or the reward of another sample
    large = {"step": 0, "groups": {"group": [0] * 3, "reward": [9e4, 0.0, 0.0], "adv": [6e4, -29999, -30001]}}
    assert doctor.diagnose(rows(columns), config, [opo, remax, large]) == []
    (finding,) = doctor.diagnose(rows(columns), config, [own, other, {"step": 5, "held_out": []}])
    assert finding["title"] == "The baseline is that of other prompts" and finding["steps"] == "step 5"


def test_bf16_is_no_fault():
    columns, config = HEALTHY["ppo"]
    noisy = columns | {"gap": 0.06, "kl": (-0.01, 1.0), "ratio_max": 1.3}
    assert doctor.diagnose(rows(noisy), config | {"dtype": "bfloat16"}) == []
    assert named(doctor.diagnose(rows(noisy), config)) == ["not_as_sampled"]


SEQUENCE = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}
ENDS = {"reward": (0.4, 0.1), "entropy": (0.4, 0.7), "kl": (0.0, 5.0), "beta": 0.3, "stop": (0.6, 0.9)}


@pytest.mark.parametrize("method, columns, changed, rule, faulty", [
    ("grpo", {"clip": 0.15, "ratio_max": 1.01}, SEQUENCE, "too_large", {"ratio": "token"}),
    ("grpo", {"clip": (0.0, 0.2)}, SEQUENCE, "reused", {"ratio": "token"}),
    ("ppo", {"kl": (0.4, 1.0), "len": 500.0}, {"dtype": "bfloat16"}, "not_the_reference",
     {"dtype": "float32"}),
    ("ppo", ENDS, {"no_eos_score": -1.0}, "wrong_sign", {"no_eos_score": None}),
    ("ppo", ENDS, {"no_eos_score": -1.0}, "kl_sign", {"no_eos_score": None}),
], ids=["gspo at first", "gspo", "long answers in bf16", "learns to end", "pays to end"])  # fmt: skip
def test_no_rule_accuses(method, columns, changed, rule, faulty):
    """Curves that are as they should be under one flag, and a fault under another."""
    healthy, config = HEALTHY[method]
    table = rows(healthy | columns)
    assert doctor.diagnose(table, config | changed) == []
    assert rule in named(doctor.diagnose(table, config | changed | faulty))


def test_two_dozen_flat_steps_are_no_fault():
    columns, config = HEALTHY["ppo"]
    flat = rows(columns | {"reward": 0.4, "kl": (0.0, 0.3)})
    assert doctor.diagnose(flat[:24], config) == []
    assert named(doctor.diagnose(flat, config)) == ["nothing_to_select"]


def test_the_loss_of_as_reward_is_no_distance():
    columns, config = HEALTHY["distill"]
    rising = rows(columns | {"loss": (0.2, 0.4)})
    assert "diverges" in named(doctor.diagnose(rising, config))
    assert "diverges" not in named(doctor.diagnose(rising, config | {"as_reward": True}))


def test_bf16_drifts_with_the_length():
    """0.4 nats over 500 tokens are rounding, over 10 they are another model."""
    columns, config = HEALTHY["ppo"]
    config = config | {"dtype": "bfloat16"}
    apart = columns | {"kl": (0.4, 1.0)}
    assert doctor.diagnose(rows(apart | {"len": 500.0}), config) == []
    assert "not_the_reference" in named(doctor.diagnose(rows(apart | {"len": 10.0}), config))


def test_every_rule_has_a_case():
    tried = {case[0] for case in CASES} | {"other_baseline"}
    assert {rule.shows.__name__ for rule in doctor.RULES} == tried


def test_words_of_the_rules():
    """Pages exist, columns are ones that a trainer writes, titles are distinct and fit a line."""
    trainers = (train_grpo, train_ppo, train_dpo, train_rm, train_sft, train_distill)
    columns = {name for trainer in trainers for name in trainer.COLUMNS}
    for rule in doctor.RULES:
        assert (ROOT / "docs" / rule.page).is_file(), rule.title
        assert set(rule.columns.split()) <= columns, rule.title
        assert len(rule.title) <= 70
        flags_named = set(re.findall(r"--(\w+)", rule.remedy + rule.meaning))
        known = set().union(*(config for _, config in HEALTHY.values()))
        assert flags_named <= known, rule.title
    assert len({rule.title for rule in doctor.RULES}) == len(doctor.RULES)


# ------------------------------------------------------------------------------------------------------------
# real runs

CAUSES = {  # what is broken in docs/data/broken_NAME.csv
    "sign": "wrong_sign",
    "lr_high": "too_large",
    "lr_low": "too_small",
    "early": "nothing_to_select",
    "overlong": "too_short",
    "late": "one_late",
    "temperature": "other_temperature",
    "prompts": "other_prompt",
    "kl_sign": "kl_sign",
    "kl_k1_loss": "k1_in_loss",
    "stale": "ignored_ratio",
    "stale_clip": "stale",
    "group2": "half_dead",
    "eos": "no_eos",
    "groups": "other_baseline",  # in no column, but in tokens.jsonl.gz
    "recomputed": "recomputed",
    "zero_grad": "not_cleared",
}


@pytest.mark.parametrize("fault", broken_runs.FAULTS, ids=lambda fault: fault.name)
def test_a_broken_run_is_named(fault):
    """All seventeen, and first. Without the file of tokens the baseline of other prompts is not seen."""
    assert named(bench_doctor.of_fault(fault))[0] == CAUSES[fault.name]
    if fault.name == "groups":
        assert doctor.diagnose(rows_of("broken_groups"), flags(train_grpo)) == []


RIGHT_RUNS = {
    "sft": (train_sft, ""), "rm": (train_rm, ""), "ppo": (train_ppo, ""), "dpo": (train_dpo, ""),
    "chain_sft": (train_sft, "--task chain"), "chain_ppo": (train_ppo, "--task chain"),
    "chain_grpo": (train_grpo, ""), "chain_distill": (train_distill, ""),
    "broken_temperature_right": (train_grpo, "--temperature 0.6"), "broken_kl_right": (train_grpo, K1),
    "broken_stale_cispo": (train_grpo, "--off_policy_steps 8 --loss cispo"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT_RUNS)
def test_nothing_is_found_in_a_right_run(name):
    trainer, words = RIGHT_RUNS[name]
    assert doctor.diagnose(rows_of(name), flags(trainer, words)) == []


@pytest.mark.parametrize("name, words", [("ppo_beta0", "--beta 0"), ("dpo_beta003", "--beta 0.03")])
def test_over_optimisation(name, words):
    trainer = train_ppo if name.startswith("ppo") else train_dpo
    found = doctor.diagnose(rows_of(name), flags(trainer, words))
    assert named(found) == ["far_off"]


KEPT = bench_doctor.kept()


@pytest.mark.parametrize("run", KEPT, ids=lambda run: run["run"])
def test_other_seeds(run):
    """Runs of bench/results/doctor.jsonl.gz: default ones in sSEED/, broken ones in broken-SEED/."""
    group, name = run["run"].split("/")
    found = named(doctor.diagnose(run["rows"], run["config"]))
    if group.startswith("broken") and name in CAUSES and name != "groups":
        assert CAUSES[name] in found[:3]
    else:
        assert found == {"chain-sft-early": ["plateau"], "kl_k2_loss": ["held_back"]}.get(name, [])


def test_five_seeds_of_every_trainer_are_kept():
    runs = {run["run"] for run in KEPT}
    names = [f"reviews-{method}" for method in ("sft", "rm", "ppo", "dpo")]
    names += [f"chain-{method}" for method in ("sft", "ppo", "grpo", "distill")]
    assert {f"s{seed}/{name}" for seed in range(5) for name in names} <= runs
    for run in KEPT:
        default = run["run"].startswith("s") and run["config"]["steps"] == len(run["rows"])
        assert default or run["run"].startswith("broken"), run["run"]


def test_the_column_of_the_page_is_what_the_doctor_says():
    page = bench_doctor.PAGE.read_text(encoding="utf-8")
    assert bench_doctor.with_column(page) == page, "run python bench/doctor.py"
    assert page.count("| The advantage has the wrong sign; ") == 1


def test_the_example_in_the_page(tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs/reviews-ppo"
    run.mkdir(parents=True)
    shutil.copy(ROOT / "docs/data/ppo_beta0.csv", run / "metrics.csv")
    monkeypatch.chdir(tmp_path)
    look.main(["--doctor", "runs/reviews-ppo"])
    page = (ROOT / "docs/reading-curves.md").read_text(encoding="utf-8")
    assert f"```\n{capsys.readouterr().out}```" in page


# ------------------------------------------------------------------------------------------------------------
# folders and the command line


def write(folder, columns, config, tokens=()):
    folder.mkdir(parents=True)
    table = rows(columns)
    with open(folder / "metrics.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if x is None else f"{x:.6g}" for name, x in row.items()} for row in table)
    (folder / "config.json").write_text(json.dumps(config))
    if tokens:
        (folder / "tokens.jsonl.gz").write_bytes(b"".join(map(pack, tokens)))


def test_findings_are_printed_within_80_columns(tmp_path, capsys):
    columns, config = HEALTHY["ppo"]
    faults = {"gap": 0.3, "kl": (0.0, 200.0), "stop": (1.0, 0.1), "explained_var": (0.0, -3.0)}
    write(tmp_path / "run", columns | faults, config)
    look.main(["--doctor", str(tmp_path / "run")])
    shown = capsys.readouterr().out.replace(str(tmp_path), "")
    assert "4 findings" in shown.split("\n")[0]
    assert max(map(len, shown.split("\n"))) <= 80
    for finding in doctor.findings(tmp_path / "run"):
        for words in finding.values():
            assert words.split()[-1] in shown


def test_a_healthy_folder(tmp_path, capsys):
    write(tmp_path / "run", *HEALTHY["grpo"])
    look.main(["--doctor", str(tmp_path / "run")])
    assert capsys.readouterr().out == f"{tmp_path}/run: nothing found\n"
    assert doctor.summary(tmp_path / "run", doctor.try_findings(tmp_path / "run")) == "doctor: nothing found"


def test_a_run_prints_its_first_finding_at_its_end(tmp_path, capsys, monkeypatch):
    """As every trainer ends: its log is closed."""
    monkeypatch.setattr(log, "plot_curves", lambda *args: None)
    cfg = train_grpo.Config(out=str(tmp_path), steps=1)
    (tmp_path / "config.json").write_text(json.dumps(to_json(cfg)))
    run = log.Log(cfg, train_grpo.COLUMNS, [], {"step": 0, "sizes": {}, "last": {}})
    run.row(0, {"gap": 1e-6, "clip": 0.4, "dead": 0.9})
    run.close(train_grpo.PANELS)
    last_lines = capsys.readouterr().out.split("\n")[-3:]
    command = f"python -m nanorlhf.look --doctor {tmp_path}"
    title = "Too few samples a prompt: many groups are dead"
    assert last_lines == [f"doctor: {title}", f"  2 findings: {command}", ""]


def test_no_folder(capsys):
    assert look.main(["--doctor", "/nowhere"]) == 2
    assert capsys.readouterr().err == "nanorlhf.look: error: /nowhere/metrics.csv: is no file\n"


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_short_runs_have_no_trends(n):
    """Of nine rows, only step 0 is judged: the same curves over twenty steps are faults."""
    healthy, config = HEALTHY["grpo"]
    faults = {"reward": (0.4, 0.0), "stop": (1.0, 0.0), "entropy": (0.4, 0.9)}
    assert named(doctor.diagnose(rows(healthy | faults), config)) == ["wrong_sign", "never_ends"]
    table = rows(healthy | faults)[:: STEPS // 10][:n]
    assert doctor.diagnose(table, config) == []
    assert doctor.diagnose([row | {"gap": 1.0} for row in table], config) != [] or n == 0


def test_a_reward_that_is_flat_at_first_is_no_finding():
    """PPO of 11 steps, whose reward rises by less than chance: nobody can say that the KL holds it back."""
    healthy, config = HEALTHY["ppo"]
    table = rows(healthy | {"reward": 0.4, "kl": (0.0, 0.04), "beta": 3.0})
    assert doctor.diagnose(table[:24], config) == []
    assert named(doctor.diagnose(table, config)) == ["held_back"]


def test_damaged_files(tmp_path):
    """A line cut short, half of a gzip, no config.json: what can be read is read."""
    columns, config = HEALTHY["grpo"]
    write(tmp_path / "run", columns | {"gap": 0.3}, config, [{"step": 0}, {"step": 1}, 5])
    assert doctor.read_tokens(tmp_path / "run") == [{"step": 0}, {"step": 1}]
    whole = (tmp_path / "run/tokens.jsonl.gz").read_bytes()
    (tmp_path / "run/tokens.jsonl.gz").write_bytes(whole[:-9])
    with open(tmp_path / "run/metrics.csv", "a") as f:
        f.write("20,0.5")
    assert len(read_rows(tmp_path / "run")) == STEPS
    assert named(doctor.findings(tmp_path / "run")) == ["not_as_sampled"]
    (tmp_path / "run/config.json").unlink()
    doctor.findings(tmp_path / "run")
    (tmp_path / "run/config.json").write_text('{"temperature": 1.')
    with pytest.raises(UserError, match="config.json"):
        doctor.findings(tmp_path / "run")


def test_not_finite_figures():
    columns, config = HEALTHY["grpo"]
    faults = {"kl": math.inf, "reward": math.nan, "gnorm": [math.inf, *[1.0] * (STEPS - 1)]}
    doctor.diagnose(rows(columns | faults), config)


def test_each_threshold_has_its_reason():
    """A rule that has a fraction in it says in its docstring why."""
    tree = ast.parse(inspect.getsource(doctor))
    rules = {rule.shows.__name__ for rule in doctor.RULES}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in rules:
            constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            if any(type(value) is float for value in constants):
                assert ast.get_docstring(node), node.name
