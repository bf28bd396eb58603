"""evaluate.py and sample.py: pass@k, maj@k, win rate and KL against enumeration; what is shown is sampled."""

import io
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from stages import jsonl

import evaluate
import sample
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import RunError, UserError, visible
from nanorlhf.hub.chat import Template
from nanorlhf.metrics import maj_at_k, mean_se, pass_at_k
from nanorlhf.run import log
from nanorlhf.run.checkpoint import NEW_RUN
from nanorlhf.run.cli import run_cli
from nanorlhf.sampling import Sampling
from nanorlhf.tokenizer import ONE_CHAR, Chat, Tokenizer

# pass@k and maj@k


@pytest.mark.parametrize("n, c, k, want", [
    (10, 3, 5, 0.916667), (10, 3, 1, 0.3), (200, 5, 10, 0.228284), (256, 1, 64, 0.25), (10, 6, 5, 1.0),
    (4, 0, 4, 0.0), (4, 4, 1, 1.0), (1, 1, 1, 1.0),
])
def test_pass_at_k_golden(n, c, k, want):
    assert pass_at_k(n, c, k) == pytest.approx(want, abs=5e-7)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            want = sum(min(s) < c for s in subsets) / len(subsets)  # the first c are the right ones
            assert pass_at_k(n, c, k) == pytest.approx(want)


@pytest.mark.parametrize("answers, rewards", [
    ("aabbc", [1, 1, 0, 0, 0]),
    ("aabbc", [0, 0, 0, 0, 1]),
    ("aaabbcc", [1, 0, 1, 0, 1, 0, 0]),  # format errors: one answer, two rewards
    ("abcdef", [0, 1, 0, 0, 1, 0]),
    ("aaaaaa", [1] * 6),
    ("aabbccdd", [1, 1, 1, 1, 0, 0, 0, 0]),
    ("abbcccdd", [0.5, 0, 0, 1, 1, 0, -1, 0.25]),
])
def test_maj_at_k_is_the_mean_over_subsets_and_ties(answers, rewards):
    """Every k-subset is counted out, ties for the most votes share equally."""
    value = {a: sum(r for b, r in zip(answers, rewards) if b == a) / answers.count(a) for a in answers}
    for k in range(1, len(answers) + 1):
        total, subsets = 0.0, list(itertools.combinations(answers, k))
        for chosen in subsets:
            votes = Counter(chosen)
            first = [a for a in votes if votes[a] == max(votes.values())]
            total += sum(value[a] for a in first) / len(first)
        assert maj_at_k(answers, rewards, k) == pytest.approx(total / len(subsets))
    assert maj_at_k(answers, rewards, 1) == pytest.approx(sum(rewards) / len(rewards))


@pytest.mark.parametrize("text, pattern, vote", [
    ("<652633>|3", r"\|([0-9])$", "3"), ("|3", r"\|([0-9])$", "3"), (" so what ", r"\|([0-9])$", "so what"),
    ("x=4, y=5", r"(x|y)=(\d)", "4"), (" 7\n", "", "7"), (" 7\n", None, "7"),
])
def test_what_votes(text, pattern, vote):
    assert evaluate.voted(text, pattern) == vote


# rates


def test_win_rate_by_hand():
    """Prompt 1: 3 wins and a tie of four comparisons. Prompt 2: a loss and a tie, twice."""
    mine, theirs = torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.5], [3.0, 0.0]])
    rate, se = evaluate.win_rate(mine, theirs)
    assert rate == pytest.approx((3.5 / 4 + 1 / 4) / 2)
    assert se == pytest.approx(abs(3.5 / 4 - 1 / 4) / 2)  # of two prompts: half their distance
    assert evaluate.win_rate(theirs, mine)[0] == pytest.approx(1 - rate)
    assert evaluate.win_rate(mine, mine)[0] == 0.5


def test_the_standard_error_is_over_prompts():
    """Copies of a sample are no new evidence; one prompt has no standard error."""
    x = torch.tensor([[0.0], [1.0], [1.0], [4.0]])
    mean, se = mean_se(x.expand(4, 8))
    assert (mean, se) == (1.5, pytest.approx(math.sqrt((2.25 + 0.25 + 0.25 + 6.25) / 3 / 4)))
    assert math.isnan(mean_se(torch.tensor([[1.0, 2.0]]))[1])


# KL

EOS, MAX = 12, 3


def tree(model, other, prompt):
    """KL(model‖other) over all responses of at most MAX tokens, each counted out: Σ_y π(y) log π(y)/π'(y)."""
    total, states = 0.0, [(prompt, 0.0, 0.0)]
    for step in range(MAX):
        tokens = torch.tensor([ids for ids, _, _ in states])
        logp, logq = (m.logits(tokens)[:, -1].double().log_softmax(-1) for m in (model, other))
        new = []
        for (ids, p, q), lp, lq in zip(states, logp, logq):
            for v in range(len(lp)):
                pv, qv = p + lp[v].item(), q + lq[v].item()
                if v == EOS or step == MAX - 1:
                    total += math.exp(pv) * (pv - qv)
                else:
                    new.append(([*ids, v], pv, qv))
        states = new
    return total


@torch.no_grad()
def test_both_kl_figures_have_the_mean_that_enumeration_gives():
    """1,900 responses enumerated; 8,000 sampled. The exact one per token has less noise, and both agree."""
    model, other = tiny(seed=0), tiny(seed=1)
    prompt = [3, 1, 4]
    exact = tree(model, other, prompt)
    roll = generate.generate(model, [prompt], 8000, MAX, 1.0, EOS, seed=0)
    k1 = (roll.logp - other.logprobs(roll.tokens, roll.mask)[0]).sum(1)
    per_token = evaluate.kl_per_token(model, other, roll.tokens, roll.mask)
    assert not per_token[~roll.mask].any()
    spreads = []
    for estimate in (k1, per_token.sum(1)):
        mean, se = mean_se(estimate)
        spreads.append(se)
        assert abs(mean - exact) < 4 * se < 0.2 * exact
    assert spreads[1] < 0.8 * spreads[0]
    logp, logq = (m.logits(roll.tokens[:1])[0].double().log_softmax(-1) for m in (model, other))
    want = (logp.exp() * (logp - logq)).sum(-1)[2]  # the first sampled token is predicted at the prompt's end
    assert per_token[0, 3].item() == pytest.approx(want.item(), rel=1e-5)


# the whole of evaluate.py


@pytest.fixture
def run(stages, tmp_path):
    """run(**flags) → evaluate.py's figures, on the prompts of `words`."""
    prompts = jsonl(tmp_path / "prompts.jsonl", [dict(prompt=f"{a}{b}c=") for a in "abc" for b in "def"])

    def call(**flags):
        size = dict(data=prompts, n=4, k=[1, 2, 4, 8], max_new_tokens=5)
        flags = size | dict(model=f"{stages.folder}/sft/model") | flags
        return evaluate.evaluate(evaluate.Config(**flags))

    return call


def begins(prompt, response):
    return float(response[:1] == prompt[2])


def test_figures_by_a_function(run, tmp_path, capsys):
    """pass@1 and maj@1 are the mean reward, k beyond n is left out, --out holds what is returned."""
    out = run(reward=[f"{__file__}:begins"], out=f"{tmp_path}/e.json")
    assert json.loads((tmp_path / "e.json").read_text()) == out
    assert out["reward"] == pytest.approx(out["pass@1"]) == pytest.approx(out["maj@1"])
    assert 0 < out["pass@1"] < out["pass@2"] < out["pass@4"] <= 1 and "pass@8" not in out
    assert {"len", "stop", "reward_se"} <= set(out) and "win" not in out and "kl" not in out
    assert f"reward          {out['reward']:10.4f} ± {out['reward_se']:.4f}" in capsys.readouterr().out


def test_every_row_of_a_file_is_scored(run, stages, tmp_path, capsys):
    """Also those that a trainer would have trained on, and as many as there are; said in one line."""
    letters = [f"{a}{b}{c}=" for a in "abcdef" for b in "abcdef" for c in "abcdef" * 2]
    path = jsonl(tmp_path / "all.jsonl", [dict(prompt=prompt, answer=prompt[2]) for prompt in letters])
    seen = Counter()

    def score(prompt, response, answer):
        seen[prompt] += 1
        return float(response[:1] == answer)

    out = run(data=path, n=2, k=[1], reward=[score])
    assert seen == {prompt: 4 for prompt in letters} and len(letters) == 432 > 256
    assert f"432 of the 432 prompts of {path} are scored, 2 samples of each" in capsys.readouterr().out
    assert out["reward"] == pytest.approx(out["pass@1"]) and 0 < out["reward"] < 1
    seen.clear()
    run(data=path, n=2, k=[1], reward=[score], prompts=10)
    assert seen == Counter(letters[:10] * 2)
    assert f"10 of the 432 prompts of {path} are scored" in capsys.readouterr().out
    with pytest.raises(UserError, match="prompts.jsonl:1: reward score .*the row has no answer"):
        run(reward=[score])


def test_probe(run, stages, capsys):
    """Dead groups and right samples by a reward that counts what it gave; greedy by the sampler's oracle.

    Prompts that begin with a are always right, those with b never; those with c by what is sampled.
    """
    given = {}

    def score(prompt, response):
        value = {"a": 1.0, "b": 0.0}.get(prompt[0], float(response[:1] in ("a", "b", "c")))
        given.setdefault(prompt, []).append((response, value))
        return value

    out = run(probe=True, reward=[score], n=8, k=[1, 8])
    printed = capsys.readouterr().out
    samples = {prompt: values[:8] for prompt, values in given.items()}
    greedy = [value for values in given.values() for _, value in values[8:]]
    assert len(samples) == 9 == len(greedy)
    model, tok = hub.load(f"{stages.folder}/sft/model")
    ids = [tok.encode(prompt) for prompt in given]
    roll = generate.reference(model, ids, max_new_tokens=5, temperature=0.0, eos_id=tok.eos_id)
    assert [tok.decode(ids) for ids in roll.responses()] == [values[8][0] for values in given.values()]
    dead = [len({value for _, value in values}) == 1 for values in samples.values()]
    assert out["dead"] == pytest.approx(sum(dead) / 9) and 6 / 9 <= out["dead"] < 1
    assert out["greedy"] == pytest.approx(sum(greedy) / 9)
    right = sum(value for values in samples.values() for _, value in values) / 72
    assert out["pass@1"] == pytest.approx(right)
    shares = f"{right:.0%} of the samples are right, {out['dead']:.0%} of the groups are dead"
    assert f"{shares}: RL can" in printed
    shown = [line for line in printed.splitlines() if " → " in line]
    firsts = [(prompt, *values[0]) for prompt, values in samples.items()][:5]
    assert shown == [f"  {prompt} → {text}   reward {value:g}" for prompt, text, value in firsts]


def test_a_probe_of_a_chat_shows_its_question_and_takes_64_prompts(tmp_path, capsys):
    tok = Tokenizer.from_bytes()
    hub.save(tiny(vocab_size=tok.vocab_size, max_len=64), tok, tmp_path / "m")
    rows = [dict(messages=[dict(role="user", content=f"{a}+{b}?")]) for a in range(9) for b in range(8)]
    flags = dict(data=jsonl(tmp_path / "chats.jsonl", rows), n=2, k=[1], max_new_tokens=3)
    out = evaluate.evaluate(
        evaluate.Config(model=f"{tmp_path}/m", probe=True, reward=[f"{__file__}:begins"], **flags)
    )
    printed = capsys.readouterr().out
    assert "64 of the 72 prompts" in printed and out["dead"] == 1 and out["greedy"] == 0
    assert re.findall(r"^  (.*) → ", printed, flags=re.M) == ["0+0?", "0+1?", "0+2?", "0+3?", "0+4?"]
    assert printed.splitlines()[-1].startswith("0% of the samples are right, 100% of the groups are dead")


@pytest.mark.parametrize("right, dead, says", [
    (0.0, 1.0, "RL cannot begin, nothing is right: take easier prompts, or SFT first"),
    (0.0, 0.5, "RL can begin, slowly"),  # a reward of several parts: nothing is right, but some is better
    (0.05, 0.9, "RL can hardly begin, samples of a prompt rarely differ"),
    (0.05, 0.7, "RL can begin, slowly: 0.1 to 0.5 right is better"),
    (0.1, 0.6, "RL can begin, from a good place"),
    (0.5, 0.3, "RL can begin, from a good place"),
    (0.5, 0.9, "RL can hardly begin"),  # half of the prompts always right, half never
    (0.6, 0.3, "RL can begin; more than half is right already"),
    (0.95, 0.7, "RL has nothing to teach here: take harder prompts"),
])
def test_whether_rl_can_begin(right, dead, says):
    shares = f"{right:.0%} of the samples are right, {dead:.0%} of the groups are dead: "
    assert evaluate.can_begin(right, dead).startswith(shares + says)


@pytest.mark.parametrize("prompt, says", [
    ("a" * 12, "a prompt of 12 tokens leaves no room for --max_new_tokens 5 in the context of 16"),
    ("é=", "tokenizer: character 'é' is not in alphabet"),
])
def test_a_row_that_cannot_be_scored_is_named(prompt, says, run, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [dict(prompt="a" * 11), dict(prompt=prompt)])
    with pytest.raises(UserError, match=f"^{path}:2: {says}"):
        run(data=path, reward=[f"{__file__}:begins"])
    assert run(data=path, reward=[f"{__file__}:begins"], prompts=1)["len"] > 0


def test_held_out_prompts_of_a_task_are_counted(tmp_path, capsys):
    task = tasks.get("chain")
    tok = Tokenizer.from_chars(task.alphabet)
    hub.save(tiny(vocab_size=tok.vocab_size, max_len=32), tok, tmp_path / "m")
    for n, flags in ((256, {}), (7, dict(prompts=7))):
        evaluate.evaluate(evaluate.Config(model=f"{tmp_path}/m", task="chain", n=1, k=[1], **flags))
        assert f"{n} held-out prompts of --task chain are scored, 1 samples" in capsys.readouterr().out


def test_against_itself_and_another(run, stages, tmp_path):
    """Against itself: one half within its error (the two sample apart), KL 0. Another: both are reported."""
    sft = f"{stages.folder}/sft/model"
    out = run(reward=[f"{__file__}:begins"], ref=sft)
    assert 0 < abs(out["win"] - 0.5) < 4 * out["win_se"]
    assert abs(out["kl"]) < 1e-6 and abs(out["kl_k1"]) < 1e-5
    model, tok = hub.load(sft)
    for p in model.parameters():
        p.data *= 1.1
    hub.save(model, tok, tmp_path / "other")
    pairs = [dict(prompt="abc=", chosen=w, rejected=l) for w, l in ("ab", "bc", "ca", "ac", "aa")]
    path = jsonl(tmp_path / "p.jsonl", pairs)
    out = run(reward=[f"{__file__}:begins"], ref=f"{tmp_path}/other", pairs=path)
    assert out["kl"] > 0.001 and 0 < out["win"] < 1 and out["ref_len"] != out["len"]
    assert out["kl_per_token"] == pytest.approx(out["kl"] / out["len"], rel=1e-4)
    sft_model = hub.load(sft)[0]
    with torch.no_grad():
        h = {}
        for y in "abc":
            ids = tok.encode("abc=" + y) + [tok.eos_id]
            logp, base = (m.logits(torch.tensor([ids]))[0].log_softmax(-1) for m in (sft_model, model))
            h[y] = (logp - base)[[3, 4], ids[4:]].sum()
    right = sum(h[w] > h[l] for w, l in ("ab", "bc", "ca", "ac"))  # the equal pair is dropped
    assert out["implicit_acc"] == pytest.approx(right / 4)
    assert "kl" not in run(ref=f"{tmp_path}/other", temperature=0.0)  # greedy samples say nothing of a KL


def test_reward_model_accuracy(run, stages, tmp_path):
    """By hand, one response at a time; a process reward model by the product over its b's and the end."""
    rm, tok = hub.load(stages.folder / "rm/model")

    def logits(y):
        ids = torch.tensor([tok.encode("abc=" + y) + [tok.eos_id]])
        return (rm.trunk(ids)[0] @ rm.score.weight[0] + rm.reward_bias)[4:]

    def at_the_end(y):
        return logits(y)[-1].item()

    def product(y):
        return math.prod(z.sigmoid().item() for z, letter in zip(logits(y), y + "b") if letter == "b")

    sides = [("cba", "a"), ("b", "cba"), ("f", "abc"), ("abcab", "fed"), ("f", "cba")]
    path = jsonl(tmp_path / "p.jsonl", [dict(prompt="abc=", chosen=w, rejected=l) for w, l in sides])
    out = run(rm=f"{stages.folder}/rm/model", pairs=path)
    last, right = (sum(score(w) > score(l) for w, l in sides) / 5 for score in (at_the_end, product))
    assert out["rm_acc"] == pytest.approx(last) and last != right
    rm.step_ids = tok.encode("b")
    hub.save(rm, tok, tmp_path / "process")
    assert run(rm=f"{tmp_path}/process", pairs=path)["rm_acc"] == pytest.approx(right)
    assert not any(name.startswith(("pass", "maj")) for name in out)  # a score has no "right"


@pytest.mark.parametrize("flags, says", [
    (dict(), "nothing to measure by"),
    (dict(model="no"), "--model no does not exist"),
    (dict(reward=["no.py:f"]), "there is no file no.py"),
    (dict(reward=[f"{__file__}:begins"], ref="SFT", pairs="no.jsonl"), "--pairs: no.jsonl: "),
    (dict(reward=[f"{__file__}:begins"], pairs="no.jsonl"), "--pairs: give --rm or --ref"),
    (dict(answer="("), "--answer .: not a regular expression"),
    (dict(out="nowhere/e.json"), "--out nowhere/e.json: there is no folder nowhere"),
    (dict(k=[0]), "--k 0: must be at least 1"),
    (dict(k=[99]), "--k 99: must not be above --n"),
    (dict(probe=True), "nothing to measure by"),
    (dict(probe=True, ref="SFT"), "--probe: give --reward, which says what is right"),
    (dict(probe=True, rm="no"), "--probe: counts right samples, which --rm does not know; give --reward"),
    (dict(probe=True, reward=[f"{__file__}:begins"], n=1, k=[1]), "--probe: needs --n 2 or more"),
    (dict(probe=True, reward=[f"{__file__}:begins"], temperature=0.0), "at a --temperature above 0"),
])
def test_bad_flags_are_named(flags, says, run, stages):
    flags = {k: f"{stages.folder}/sft/model" if v == "SFT" else v for k, v in flags.items()}
    with pytest.raises(UserError, match=says):
        run(**flags)


# sample.py


@pytest.mark.parametrize("how", [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.3, 0, 0.8), (0.0, 0, 1.0)])
@pytest.mark.parametrize("style", ["gpt2", "llama-gqa-untied"])
def test_the_stream_is_what_generate_samples(how, style):
    """Token for token and log-prob for log-prob, from the same seed."""
    model = tiny(style)
    for seed in range(5):
        roll = generate.generate(model, [[1, 2, 3]], 1, 9, how[0], EOS, seed, *how[1:])
        ids, logps = zip(*sample.stream(model, [1, 2, 3], 9, EOS, seed, Sampling(*how)))
        assert list(ids) == roll.tokens[0][roll.mask[0]].tolist()
        assert logps == pytest.approx(roll.logp[0][roll.mask[0]].tolist(), abs=1e-5)


def test_half_a_character_waits_for_its_other_half(capsys):
    """What is on the screen grows by whole characters only; at the end what was left over is shown."""
    tok, seen = Tokenizer.from_bytes(), []
    ids = [*"é€x".encode(), tok.eos_id]

    def tokens():
        for i in ids:
            yield i, -0.5
            seen.append(capsys.readouterr().out)

    assert sample.show(tokens(), tok) == (ids, -0.5 * len(ids))
    assert seen == ["", "é", "", "", "€", "x", ""] and capsys.readouterr().out == " [EOS]\n"
    sample.show(((i, 0.0) for i in "a€".encode()[:-1]), tok)
    assert capsys.readouterr().out == "a\ufffd [cut after 3 tokens]\n"


def test_the_end_of_an_answer_is_visible(capsys):
    """EOS, another id that ends a turn, or the limit; also beside log-probs, and where nothing was said."""
    tok = Tokenizer.from_bytes()
    for ids, stops, said, end in (
        ([104, 105, tok.eos_id], (), "hi", "[EOS]"),
        ([104, 105], (), "hi", "[cut after 2 tokens]"),
        ([104, 105], (105,), "h", "[EOS]"),
        ([tok.eos_id], (), "", "[EOS]"),
    ):
        assert sample.show(((i, -1.0) for i in ids), tok, stops=stops) == (ids, -1.0 * len(ids))
        assert capsys.readouterr().out == f"{said} {end}\n"
        sample.show(((i, -1.0) for i in ids), tok, logprobs=True, stops=stops)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(ids) + 1 and lines[-1].endswith(f"in all, {len(ids)} tokens, {end}")
        assert lines[-2].endswith("  EOS" if end == "[EOS]" else "  'i'")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """terminal(columns) → a file that says it is a terminal of that many columns, in place of stdout."""

    def make(columns):
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("COLUMNS", str(columns))
        return screen

    return make


def typed(text, pieces):
    """Write a text in pieces of so many characters."""
    screen = sample.Screen()
    for i in range(0, len(text), pieces):
        screen.write(text[i : i + pieces])
    screen.end()


@pytest.mark.parametrize("pieces", [1, 2, 3, 1000])
@pytest.mark.parametrize("text, want", [
    ("the quick brown fox", "the quick\nbrown fox\n"),
    ("0123456789", "0123456789\n"),  # a line that is just full
    ("01234 6789 x", "01234 6789\nx\n"),
    ("a\nbb ccc dddd", "a\nbb ccc\ndddd\n"),
    ("a\n\n  b", "a\n\n  b\n"),  # indented code stays so
    ("0123456789012 x", "0123456789012\nx\n"),  # a word of more than a line: the terminal breaks it
    ("ab 0123456789012", "ab\n0123456789012\n"),
    ("中文字符很多的", "中文字符很\n多的\n"),  # two columns each
    ("ab 中文字符很", "ab 中文字\n符很\n"),
    ("", "\n"),
])  # fmt: skip
def test_words_do_not_break_at_the_edge(text, want, pieces, terminal):
    screen = terminal(10)
    typed(text, pieces)
    assert screen.getvalue() == want


@pytest.mark.parametrize("columns", [7, 20, 80])
def test_no_line_is_longer_than_the_terminal(columns, terminal):
    """Random texts: no word is cut or lost, and no line could have taken the first word of the next."""
    rng = random.Random(columns)
    for _ in range(50):
        words = ["x" * rng.randint(1, columns) for _ in range(rng.randint(1, 40))]
        screen = terminal(columns)
        typed(" ".join(words), rng.randint(1, 9))
        lines = screen.getvalue().splitlines()
        assert " ".join(lines).split() == words and max(map(len, lines)) <= columns
        for line, following in itertools.pairwise(lines):
            assert len(line) + 1 + len(following.split()[0]) > columns


def test_what_is_no_terminal_gets_the_text_as_it_is(capsys):
    typed("word " * 100, 7)
    assert capsys.readouterr().out == "word " * 100 + "\n"


def test_an_answer_begins_behind_its_prompt(stages, terminal):
    screen = terminal(9)
    flags = dict(model=f"{stages.folder}/sft/model", prompt="abc=", max_new_tokens=5)
    ((ids, _),) = sample.main(sample.Config(**flags))
    lines = screen.getvalue().splitlines()
    assert lines[0].startswith("abc=") and max(map(len, lines)) <= 9 and "[" in screen.getvalue()


OBEYED = ["\x1b[2J", "\x1b]0;title\x07", "a\rb", "\x9b31m", "\u202egnp.exe", "\b\x7f", "\u2028"]


@pytest.mark.parametrize("bad", OBEYED)
def test_control_sequences_are_shown(bad, tmp_path, capsys):
    """On the screen, in prompts and answers, in samples.jsonl, in warnings and errors."""
    assert not any(c in visible(bad) for c in bad if not c.isprintable())
    assert json.loads(f'"{visible(bad)}"') == bad and visible("é 中\n\t😀") == "é 中\n\t😀"
    tok = Tokenizer.from_bytes()
    sample.show(((i, 0.0) for i in bad.encode()), tok)
    sample.show(((i, 0.0) for i in bad.encode()), tok, logprobs=True)
    hub.save(tiny(vocab_size=tok.vocab_size, max_len=64), tok, tmp_path / "m")
    sample.main(sample.Config(model=f"{tmp_path}/m", prompt=bad, max_new_tokens=1))
    cfg = SimpleNamespace(out=tmp_path, steps=1, wandb="", look_rows=0)
    run = log.Log(cfg, ["step"], [], NEW_RUN)
    run.samples(0, [{"prompt": bad}], [bad], None)
    run.say(bad)

    def stops(cfg):
        raise RunError(f"prompt {bad}")

    assert run_cli(sample.Config, stops, "", []) == 1
    out, err = capsys.readouterr()
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    for shown in (out, err, text):
        assert shown.count("\n") >= 1 and not any(c in shown for c in bad if not c.isprintable())
    assert out.count(visible(bad)) >= 3
    assert json.loads(text) == {"step": 0, "prompt": bad, "response": bad}


def test_help_while_talking(stages, monkeypatch, capsys):
    """/help is no prompt; the hint to it stands only before who types."""
    flags = dict(model=f"{stages.folder}/sft/model", max_new_tokens=5)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\nabc=\n /help \n\n"))
    assert len(sample.main(sample.Config(**flags))) == 1
    out = capsys.readouterr().out
    assert out.count(sample.HELP) == 2 and "/help" not in out
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    monkeypatch.setattr("builtins.input", lambda ask: "")
    assert sample.main(sample.Config(**flags)) == [] and "/help" in capsys.readouterr().out


def test_standard_input_that_is_closed_or_no_utf8(stages, monkeypatch, capsys):
    argv = [f"--model={stages.folder}/sft/model", "--max_new_tokens=2"]
    monkeypatch.setattr(sys, "stdin", None)  # as with <&-
    assert run_cli(sample.Config, sample.main, "", argv) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc=\n\xff=\n"), "utf-8"))
    assert run_cli(sample.Config, sample.main, "", argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: standard input: 'utf-8' codec can't decode byte 0xff" in line


def test_talking_to_a_checkpoint(stages, capsys, monkeypatch):
    """One prompt from a flag, or one a line; answers differ, but not of one seed; log-probs add up."""
    flags = dict(model=f"{stages.folder}/sft/model", max_new_tokens=5)
    answers = sample.main(sample.Config(prompt="abc=", n=3, **flags))
    shown = capsys.readouterr().out
    assert len(answers) == 3 and len({tuple(ids) for ids, _ in answers}) > 1 and shown.count("abc=") == 3
    assert sample.main(sample.Config(prompt="abc=", n=3, **flags)) == answers
    capsys.readouterr()
    ((ids, total),) = sample.main(sample.Config(prompt="abc=", logprobs=True, **flags))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ids) + 1 and (ids, total) == answers[0]
    assert sum(float(line.split()[0]) for line in lines[:-1]) == pytest.approx(total, abs=1e-2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc=\ndef=\n\nfed=\n"))
    assert len(sample.main(sample.Config(**flags))) == 2  # until the empty line
    assert "def=" in capsys.readouterr().out


def test_chat_answers_a_users_turn(tmp_path, capsys):
    tok, seen = Tokenizer.from_bytes(), []
    hub.save(tiny(vocab_size=tok.vocab_size, max_len=64), tok, tmp_path / "m")
    for text, flags in (("hi", dict(chat=True)), ("User:\nhi\n\nAssistant:\n", {})):
        flags |= dict(model=f"{tmp_path}/m", prompt=text, max_new_tokens=9)
        seen.append((sample.main(sample.Config(**flags)), capsys.readouterr().out))
    assert seen[0] == seen[1]


def test_a_chat_is_shown_as_the_model_reads_it(tmp_path, capsys, monkeypatch):
    """With the control tokens of its template, in the terminal and in samples.jsonl."""
    control = {"<end>": 256, "<pad>": 257, "<user>": 258}
    tok = Tokenizer("bytes", ONE_CHAR, [bytes([b]) for b in range(256)], control, "<end>", "<pad>")
    tok.template = Template("<user>{{ messages[0].content }}<end>", {}, control)
    model = tiny(vocab_size=tok.vocab_size, max_len=64)
    monkeypatch.setattr(sample, "load_model", lambda *args: (model, tok))
    sample.main(sample.Config(prompt="hi", chat=True, max_new_tokens=3))
    assert capsys.readouterr().out.startswith("<user>hi<end>")
    row = {"prompt": Chat([{"role": "user", "content": "hi"}])}
    row["_ids"] = tok.encode_prompt(row["prompt"])
    roll = generate.sample_responses(model, tok, [row], 1, 3, 1.0, 0)
    written = log.Log(SimpleNamespace(steps=1, out=tmp_path, wandb="", look_rows=0), ["step"], [], NEW_RUN)
    written.samples(0, roll.rows, roll.texts, None)
    assert json.loads((tmp_path / "samples.jsonl").read_text())["prompt"] == "<user>hi<end>"


@pytest.mark.parametrize("flags, says", [
    (dict(prompt="a" * 16), "a prompt of 16 tokens leaves 0 of the context of 16"),
    (dict(prompt="abc=", max_new_tokens=13), "--max_new_tokens 13: a prompt of 4 tokens leaves 12"),
    (dict(prompt="!"), "character '!'"),
])
def test_prompts_that_cannot_be(flags, says, stages):
    with pytest.raises(UserError, match=says):
        sample.main(sample.Config(model=f"{stages.folder}/sft/model", **flags))


def test_the_length_of_responses_to_data_is_the_rooms(run, stages, tmp_path, capsys):
    """Without --max_new_tokens: what the context leaves behind the longest prompt, not a toy's 40 tokens."""
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "ab="}, {"prompt": "abcd="}])
    run(data=path, n=1, k=[1], max_new_tokens=0, reward=[f"{__file__}:begins"])
    assert "--max_new_tokens 11: by" in capsys.readouterr().out  # a context of 16
