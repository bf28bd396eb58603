"""The doctor: rules that know how a broken run looks, read config.json and metrics.csv, and say what to try.

A rule is a small function from a Read to the rows of metrics.csv in which its fault shows; most often there
are none. Its words stand in RULES, below the functions, the surest cause first. The tables of
docs/reading-curves.md and docs/broken-runs.md are these rules in prose, with the curves that they come from.
Thresholds were chosen on seeds 0 to 2 of default runs and of the broken ones, and tried on other seeds:
bench/doctor.py.
"""

import math
import statistics
import textwrap
from typing import NamedTuple

from nanorlhf.errors import visible
from nanorlhf.look.folder import read_config, read_rows, read_tokens

TREND = 10  # rows; of fewer, five fifths would have one row each, and a trend would be noise
SURE = 4  # standard errors; three are passed by chance in one of 400 columns, four in one of 16,000
LOG_2 = math.log(2)  # the loss of a pair of which nothing is known


class Row(dict):
    """One step of metrics.csv. A cell that is empty or absent is NaN, of which every comparison is false."""

    def __missing__(self, name):
        return math.nan


class Read:
    """A run as the rules see it.

    rows    every step that was logged
    start   the first of them
    early   means over the first fifth of them; empty in a run too short for a trend
    late    the same over the last fifth
    tokens  records of tokens.jsonl.gz
    """

    def __init__(self, rows, config, tokens=()):
        self.config = config
        self.tokens = tokens
        self.rows = [Row({name: x for name, x in row.items() if x is not None}) for row in rows]
        fifth = max(1, len(rows) // 5)
        self.start = self.rows[0] if rows else Row()
        self.early = self.mean(self.rows[:fifth])
        self.late = self.mean(self.rows[-fifth:])
        self.noise = SURE * self.early["reward_se"] * math.sqrt(2 / fifth)  # of a difference of two fifths

    def mean(self, rows):
        means = Row()
        for name in {name for row in rows for name in row if len(self.rows) >= TREND}:
            means[name] = statistics.fmean(column(rows, name) or [math.nan])
        return means

    def first(self, holds):
        """→ the first row where this holds at step 0, else none."""
        return self.rows[:1] if holds and self.start["step"] == 0 else []

    def all(self, holds):
        """→ all rows where this holds of the run, else none."""
        return self.rows if holds else []

    def number(self, flag):
        """A flag as a number; 0 if the trainer has no such flag."""
        value = self.config.get(flag)
        return value if isinstance(value, (int, float)) else 0

    def is_set(self, flag, value):
        return self.config.get(flag) == value

    def updates(self):
        """Optimizer steps a rollout."""
        return self.number("epochs") * self.number("minibatches")

    def penalty(self, row):
        """β · KL of a row: 0 where no KL is charged."""
        beta = 0 if self.is_set("kl", "none") else row["beta"] if "beta" in row else self.number("beta")
        return beta * row["kl"]


def column(rows, name):
    return [row[name] for row in rows if math.isfinite(row[name])]


# ------------------------------------------------------------------------------------------------------------
# step 0: what must hold before anything is learnt


def one_late(run):
    """Half a nat a token before any update: no rounding and no temperature in use moves log-probs so far."""
    return run.first(run.start["gap"] > 1 and run.start["kl"] > 0.5 * run.start["len"])


def other_temperature(run):
    return not_as_sampled(run) if not run.is_set("temperature", 1.0) else []


def not_as_sampled(run):
    """Rounding is 1e-6 in fp32; bf16 moves single log-probs by up to a tenth or so."""
    rounding = 1e-4 if run.is_set("dtype", "float32") else 0.5
    return run.first(run.start["gap"] > rounding and not one_late(run))


def not_the_reference(run):
    """Where --ref is --init; distillation and GRPO with another reference start away from it."""
    same = run.is_set("ref", run.config.get("init")) and not run.start["gap"] > 1e-4
    return run.first(same and abs(run.start["kl"]) > 1e-3)


def no_eos(run):
    """The tokens of the loss, tok_s · s, lack as many as there are responses that ended with EOS, within 1%."""
    samples = run.number("prompts_per_step") * max(1, run.number("group_size"))
    ended = samples * run.start["stop"]
    missing = samples * run.start["len"] - run.start["tok_s"] * run.start["s"]
    dropped = run.config.get("dead_groups") in ("drop", "refill")  # these leave the loss as well
    return run.first(ended > 0 and abs(missing - ended) < 0.01 * ended and not dropped)


def other_prompt(run):
    """Both are samples of the policy at step 0. Held-out files of one's own may be harder."""
    apart = abs(run.start["reward"] - run.start["eval/reward"])
    return run.first(apart > SURE * run.start["reward_se"] * math.sqrt(2) and not run.config.get("eval_data"))


def other_baseline(run):
    """In its own group an advantage is r − mean, whatever it is divided by: the group's mean is 0."""
    shows = []
    for record in run.tokens if not run.is_set("norm", "batch_whiten") else ():
        groups = record.get("groups", {})
        sums = Row()
        for group, advantage in zip(groups.get("group", ()), groups.get("adv", ())):
            sums[group] = sums.get(group, 0) + advantage
        if any(abs(total) > 0.1 for total in sums.values()):
            shows.append(Row(step=record["step"]))
    return shows


def half_dead(run):
    """A group of equal rewards has no gradient; from one half on, more samples a prompt pay for themselves."""
    return run.first(run.start["dead"] >= 0.5)


def too_large(run):
    """The learning rate is warming up at step 0: default runs clip below 2%, and their ratios stay below 1.6."""
    fresh = not run.number("off_policy_steps") and not run.start["gap"] > 1e-3
    return run.first(fresh and (run.start["clip"] > 0.05 or run.start["ratio_max"] > 2.2))


def not_log_2(run):
    offline = run.is_set("loss", "dpo") and "logp_chosen" in run.start and not run.number("online")
    return run.first(offline and abs(run.start["loss"] - LOG_2) > 1e-3)


# ------------------------------------------------------------------------------------------------------------
# reinforcement learning


def still(run):
    """Nothing moves. With one update a rollout the ratio is 1 by construction: then the KL alone tells."""
    ratios = column(run.rows, "ratio_max")
    kls = column(run.rows, "kl")
    return len(run.rows) >= TREND and ratios and kls and max(ratios) < 1.01 and max(kls) < 0.01


def too_small(run):
    return run.all(still(run) and run.late["gnorm"] > 0)


def recomputed(run):
    ones = all(ratio == 1 for ratio in column(run.rows, "ratio_max"))
    return run.all(ones and run.updates() > 1 and run.late["gnorm"] > 0 and run.late["kl"] > 0.01)


def k1_in_loss(run):
    k1 = run.is_set("kl", "k1") and run.is_set("kl_in", "loss") and run.is_set("kl_unbiased", False)
    return run.all(k1 and costs_more_than_it_earns(run))


def costs_more_than_it_earns(run):
    """Whoever maximises reward − β·KL pays at most what the reward has gained; RL starts at a KL of 0."""
    gained = run.late["reward"] - run.start["reward"] + SURE * run.start["reward_se"]
    return "ratio_max" in run.start and run.penalty(run.late) > max(gained, 0)


def kl_sign(run):
    """A lower bound in nats: a small KL times β is within the noise of the reward."""
    return run.all(costs_more_than_it_earns(run) and run.late["kl"] > 0.5 and not k1_in_loss(run))


def falls(run):
    lost = run.start["reward"] - run.late["reward"]
    return "ratio_max" in run.start and lost > SURE * run.start["reward_se"]


def too_short(run):
    shorter = run.number("overlong_penalty") and run.late["len"] < 0.9 * run.start["len"]
    return run.all(falls(run) and shorter)


def wrong_sign(run):
    """It falls from the first step on: no row has been better than chance allows. Likely tokens get unlikely."""
    best = max(column(run.rows, "reward"), default=0)
    never_rose = best < run.start["reward"] + SURE * run.start["reward_se"]
    confused = run.late["entropy"] > 1.2 * run.start["entropy"]
    return run.all(falls(run) and never_rose and confused and not too_short(run))


def ignored_ratio(run):
    """exp(0.7): a sample whose token the policy makes twice as likely is another policy's sample."""
    return [row for row in run.rows if run.is_set("loss", "reinforce") and row["ratio_max"] > 2]


def clipped(run):
    """Default runs stay below 2%; above 10% the tokens that moved most, which matter, have no gradient."""
    return [row for row in run.rows if row["clip"] > 0.1]


def stale(run):
    return clipped(run) if run.number("off_policy_steps") else []


def reused(run):
    known = one_late(run) or too_large(run) or run.number("off_policy_steps")
    return [] if known else clipped(run)


def not_cleared(run):
    """Dead groups have no gradient, so where most are dead the norm is small, unless old gradients remain."""
    norms = column(run.rows, "gnorm")
    only_from_reward = run.is_set("kl", "none") and run.number("entropy_coef") == 0
    all_large = norms and min(norms) > run.number("max_grad_norm") > 0
    return run.all(only_from_reward and all_large and run.late["dead"] > 0.5)


def collapsed(run):
    """All groups score alike and below what the run has had, so nothing is left to recover with."""
    best = max(column(run.rows, "reward"), default=0)
    return run.all(run.late["dead"] > 0.95 and run.late["reward"] < best - 2 * run.noise - 0.1)


def flat(run):
    """The reward has not changed by more than chance, although the policy has moved."""
    change = abs(run.late["reward"] - run.early["reward"])
    moved = "ratio_max" in run.start and not still(run) and run.early["dead"] < 0.5
    return moved and change < run.noise and not one_late(run)


def held_back(run):
    return run.all(flat(run) and run.late["kl"] < 1 and run.penalty(run.late) > 0)


def nothing_to_select(run):
    return run.all(flat(run) and run.late["kl"] > 0.05 and not run.penalty(run.late))


def never_ends(run):
    return run.all(run.late["stop"] < run.start["stop"] - 0.2)


def shrinks(run):
    return run.all(run.late["len"] < run.start["len"] / 3)


def far_off(run):
    """One nat a token: on average the reference gives a token e⁻¹ of the probability that the policy gives it."""
    start_is_near = run.start["kl"] < 0.5 * run.start["len"]
    return [row for row in run.rows if start_is_near and row["kl"] > row["len"]]


def poor_critic(run):
    """A constant critic has 0. Where the rewards hardly vary any more, any error of the critic is below it."""
    varies = run.late["reward_se"] > 0.5 * run.early["reward_se"]
    return run.all(varies and run.late["explained_var"] < -0.3)


def reward_fails(run):
    return [row for row in run.rows if row["reward_failed"] > 0.05]


# ------------------------------------------------------------------------------------------------------------
# learning from examples, from pairs and from a teacher


def diverges(run):
    """A loss a tenth above where it began is worse than knowing nothing."""
    return run.all(run.late["loss"] > 1.1 * run.start["loss"])


def undecided(run):
    pairs = "margin" in run.start and not (run.config.get("loss") or "dpo") != "dpo"
    return run.all(pairs and abs(run.late["loss"] - LOG_2) < 0.01)


def swapped(run):
    """Below one half by more than chance: 32 pairs a step, a fifth of a hundred steps."""
    return run.all("margin" in run.start and run.late["acc"] < 0.45)


def memorises(run):
    held_out = column(run.rows, "eval/loss")
    worse = held_out and held_out[-1] > 1.05 * min(held_out)
    return run.all(worse and run.late["loss"] < run.early["loss"])


def only_length(run):
    last = run.rows[-1] if run.rows else Row()
    return run.all(len(run.rows) >= TREND and last["eval/acc"] < last["eval/acc_len_only"] + 0.02)


def no_headway(run):
    """SFT's loss, and the KL to a teacher, fall within ten steps or not at all."""
    name = "kl" if "teacher" in run.config else "loss"
    return run.all("acc" not in run.start and run.late[name] > 0.97 * run.start[name])


def plateau(run):
    """Of chain: 1.05 while only the formats are learnt, 0.35 with the sums."""
    return run.all("demos" in run.config and run.is_set("task", "chain") and run.late["loss"] > 0.8)


def own_prefixes(run):
    held_out = column(run.rows, "eval/kl")
    worse = len(held_out) > 1 and held_out[-1] > 0.9 * held_out[0]
    return run.all(worse and run.late["kl"] < 0.9 * run.start["kl"])


# ------------------------------------------------------------------------------------------------------------
# the words


class Rule(NamedTuple):
    shows: object  # function of a Read → the rows in which the fault shows
    columns: str  # whose values are printed
    title: str
    meaning: str
    remedy: str
    page: str  # in docs/


RULES = [
    Rule(one_late, "gap kl", "Log-probs belong to other tokens: they are a position late or early",
         "Before any update the policy gives its own samples other log-probs than the sampler did, by nats.",
         "Make the shift between hidden states and tokens in one place; compare with nanorlhf/model.py.",
         "broken-runs.md"),
    Rule(other_temperature, "gap ratio_max kl", "The temperature of sampling is forgotten in scoring",
         "The ratio must be 1 in the first minibatch. --temperature is not 1, and one of the two ignores it.",
         "Pass --temperature to every function that returns log-probs.",
         "broken-runs.md"),
    Rule(not_as_sampled, "gap ratio_max kl", "Sampling and scoring disagree: the ratio is not 1 at step 0",
         "The log-probs of the sampler are not those of the loss: temperature, dropout, dtype, or old weights.",
         "Score with the sampler's weights, temperature and dtype; switch dropout off.",
         "04-grpo.md"),
    Rule(not_the_reference, "kl", "The reference is not the policy that the run starts from",
         "KL at step 0 must be 0: both were read from the same folder.",
         "Load the reference before the first update, in the policy's dtype, and freeze it.",
         "00-notation.md"),
    Rule(no_eos, "len stop tok_s s", "EOS is outside the mask",
         "As many tokens are missing from the loss as there are responses that ended: nobody learns to stop.",
         "Make the mask from lengths, never from token ids.",
         "broken-runs.md"),
    Rule(other_prompt, "reward eval/reward", "Rewards are judged by another prompt",
         "The same policy scores differently on training and held-out prompts before the first update.",
         "Compare the prompt of each sample in samples.jsonl with the row that its reward was given.",
         "broken-runs.md"),
    Rule(other_baseline, "", "The baseline is that of other prompts",
         "Over a group the advantages must sum to 0, and they do not: rewards and groups are in different order.",
         "Permute the prompts: the advantages must follow.",
         "broken-runs.md"),
    Rule(half_dead, "dead", "Too few samples a prompt: half of the groups teach nothing",
         "All samples of a dead group score the same, so their advantages are 0.",
         "A larger --group_size with fewer prompts; prompts neither so hard nor so easy.",
         "broken-runs.md"),
    Rule(not_log_2, "loss", "Policy and reference differ at step 0, or score other tokens",
         "DPO's loss starts at log 2 = 0.693, because both models are the same and every pair is a tie.",
         "Compare --ref with --init, and the tokens that each of them scores.",
         "06-dpo.md"),
    Rule(too_large, "clip ratio_max", "The learning rate is too high",
         "Within one rollout the policy has moved out of the clipping range. It soon collapses.",
         "A tenth of --lr.",
         "broken-runs.md"),
    Rule(too_small, "ratio_max kl gnorm", "The learning rate is too low",
         "There is a gradient, and the policy does not move.",
         "Raise --lr until ratio_max reaches 1.1.",
         "broken-runs.md"),
    Rule(recomputed, "ratio_max kl", "Old log-probs are recomputed: there is no ratio",
         "The ratio is 1.000000 in every update although there are several a rollout, so nothing is clipped.",
         "Keep the log-probs that the sampler returned; never compute them with the policy of the update.",
         "broken-runs.md"),
    Rule(k1_in_loss, "reward kl", "k1 in the loss is no KL penalty: its mean gradient is 0",
         "The policy pays more KL, times --beta, than its reward has gained.",
         "--kl_unbiased true, --kl k2, or --kl_in reward.",
         "broken-runs.md"),
    Rule(kl_sign, "reward kl", "The KL has the wrong sign, or no gradient",
         "The policy pays more KL, times beta, than its reward has gained: distance is not penalised.",
         "Compare with --beta 0: with a penalty kl must end lower. Check the sign where beta is used.",
         "broken-runs.md"),
    Rule(too_short, "reward len", "The length penalty falls on a length that is needed",
         "Responses get shorter and worse. reward is the score before the penalty, which is what rises.",
         "A larger --max_new_tokens, or a smaller --overlong_penalty.",
         "broken-runs.md"),
    Rule(wrong_sign, "reward entropy", "The advantage has the wrong sign",
         "The reward falls from the start while the entropy rises: likely tokens are made unlikely.",
         "After one step on one sample with A > 0 its log-prob must be higher. Check ratio and loss as well.",
         "broken-runs.md"),
    Rule(ignored_ratio, "ratio_max kl", "Stale samples, and no ratio corrects them",
         "--loss reinforce ignores a ratio far from 1: each correction arrives some updates late.",
         "--loss clip or cispo, or one update on fresh samples.",
         "broken-runs.md"),
    Rule(stale, "clip ratio_max", "Stale samples: the clip stops the tokens that moved most",
         "Samples of --off_policy_steps ago are another policy's, and clipped tokens have no gradient.",
         "Fewer --off_policy_steps, or --loss cispo, which keeps every gradient.",
         "broken-runs.md"),
    Rule(reused, "clip ratio_max", "Too many updates on one rollout, or too large ones",
         "More than a tenth of the tokens are clipped and have no gradient.",
         "Fewer --epochs or --minibatches, a smaller --lr; a larger clip range for sequence ratios.",
         "05-ppo.md"),
    Rule(not_cleared, "gnorm dead", "Gradients are never cleared",
         "Most groups are dead and give no gradient, and its norm is still above --max_grad_norm in every step.",
         "Call zero_grad before each optimizer step.",
         "broken-runs.md"),
    Rule(collapsed, "reward dead", "The policy has collapsed: no gradient is left to recover with",
         "All samples of each group score alike, and worse than earlier in the run.",
         "Start again from an earlier checkpoint with a smaller --lr, or with a KL penalty.",
         "broken-runs.md"),
    Rule(held_back, "reward kl", "The KL coefficient is too large",
         "The reward does not rise, and the policy stays next to the reference.",
         "A smaller --beta.",
         "05-ppo.md"),
    Rule(nothing_to_select, "reward kl len", "There is nothing to select: SFT ended too early",
         "The policy moves and the reward does not. Rewards may also be given to the wrong samples.",
         "More SFT, easier prompts, or pass@k of the SFT model first; then read samples.jsonl.",
         "broken-runs.md"),
    Rule(never_ends, "stop len", "Responses no longer end",
         "EOS earns nothing: it is outside the mask, or a cut response scores as well as a whole one.",
         "Score cut responses lower, as --no_eos_score does.",
         "05-ppo.md"),
    Rule(shrinks, "len reward", "Responses shrink to a few tokens",
         "The reward prefers short texts, or the KL, which each token pays, outweighs it.",
         "Read samples.jsonl. A reward for what is missing, or a smaller --beta.",
         "05-ppo.md"),
    Rule(far_off, "kl reward", "Over-optimisation: the policy has left the reference",
         "More than a nat of KL a token. The reward, or the loss of pairs, no longer says what the text is worth.",
         "A larger --beta, or fewer steps. Read samples.jsonl, and ask a judge that was not optimised.",
         "05-ppo.md"),
    Rule(poor_critic, "explained_var", "The critic is worse than a constant",
         "Its errors vary more than the returns do.",
         "A smaller --critic_lr, or another --critic_init; check at which position values are read.",
         "05-ppo.md"),
    Rule(reward_fails, "reward_failed", "The reward function fails",
         "Its calls raise or time out, and such a sample scores 0.",
         "Call the function on a line of samples.jsonl by hand; a longer --reward_timeout.",
         "00-notation.md"),
    Rule(diverges, "loss gnorm", "The loss is above where it began: the learning rate is too high",
         "Steps are longer than the distance in which the gradient says anything.",
         "A tenth of --lr, or a smaller --max_grad_norm.",
         "01-sft.md"),
    Rule(swapped, "acc margin", "Chosen and rejected are swapped",
         "The pairs are ranked the wrong way round: a sign, or the labels.",
         "Read pairs.jsonl: is the first one the better?",
         "06-dpo.md"),
    Rule(undecided, "loss acc", "The loss stays at log 2 = 0.693: nothing is learnt from the pairs",
         "Labels are shuffled, scores are read at a pad, or --lr is far too small.",
         "Read pairs.jsonl; raise --lr.",
         "02-rm.md"),
    Rule(memorises, "loss eval/loss", "The model memorises",
         "The loss falls on what it has seen and rises on what it has not.",
         "Fewer steps, or more data.",
         "01-sft.md"),
    Rule(only_length, "acc", "The reward model has learnt the length",
         "It ranks held-out pairs no better than a judge that sees lengths alone.",
         "Pairs of equal lengths; more pairs. PPO would write long texts, or short ones.",
         "02-rm.md"),
    Rule(no_headway, "loss kl", "Nothing is learnt",
         "After all steps the loss is where it began. It may count no tokens.",
         "Raise --lr; read in metrics.csv how many tokens, len, the loss counts.",
         "01-sft.md"),
    Rule(plateau, "loss", "SFT ended on its plateau",
         "The formats are learnt and the sums are not: RL would have nothing to select.",
         "More --steps.",
         "01-sft.md"),
    Rule(own_prefixes, "kl", "The student is lost on its own prefixes",
         "The KL falls on the teacher's texts and not on the student's.",
         "--on_policy 1.",
         "07-distill.md"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# findings


def diagnose(rows, config, tokens=()):
    """What is read from the files of a run folder → findings, the surest cause first.

    A finding is a dict: title, steps (in which it shows, with the values there), meaning, remedy, page.
    """
    run = Read(rows, config, tokens)
    found = []
    for rule in RULES:
        shown_in = rule.shows(run)
        if shown_in:
            words = {"title": rule.title, "steps": span(shown_in, rule.columns.split())}
            found.append(words | {"meaning": rule.meaning, "remedy": rule.remedy, "page": rule.page})
    return found


def span(rows, names):
    """'step 0: gap 0.344' or 'steps 0 to 49: reward 0.406 → 0.082, entropy 0.398 → 0.662'."""
    first = rows[0]["step"]
    last = rows[-1]["step"]
    values = []
    for name in names:
        measured = column(rows, name)
        if measured:
            ends = measured[:1] if first == last else [measured[0], measured[-1]]
            values.append(f"{name} {' → '.join(f'{x:.3g}' for x in ends)}")
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return ": ".join([steps, ", ".join(values)][: 1 + bool(values)])


def findings(run_folder):
    """What the rules find in a run folder: a list of dicts, as in `diagnose`; UserError without metrics.csv."""
    return diagnose(read_rows(run_folder), read_config(run_folder), read_tokens(run_folder))


def summary(run_folder):
    """What a trainer prints at its end: a line, and how to read on where there is something to read."""
    found = findings(run_folder)
    if not found:
        return "doctor: nothing found"
    more = f" (the first of {len(found)} findings)" if len(found) > 1 else ""
    command = f"python -m nanorlhf.look --doctor {run_folder}"
    return visible(f"doctor: {found[0]['title']}{more}\n  {command}")


def main(run_folder):
    """Print the findings in a run folder within 80 columns. Nothing in them is an error of this program."""
    found = findings(run_folder)
    count = {0: "nothing found", 1: "1 finding"}.get(len(found), f"{len(found)} findings")
    print(visible(f"{run_folder}: {count}"))
    for i, finding in enumerate(found, start=1):
        print(f"\n{i}. {finding['title']}")
        for words in (finding["steps"], finding["meaning"], f"Try: {finding['remedy']}", f"docs/{finding['page']}"):
            print(textwrap.fill(words, 80, initial_indent="   ", subsequent_indent="   "))
