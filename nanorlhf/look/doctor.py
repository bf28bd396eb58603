"""The doctor: rules that know how a broken run looks, read config.json and metrics.csv, and say what to try.

A rule is a small function from a Run to the rows of metrics.csv in which its fault shows; most often there
are none. Its words stand in RULES, below the functions, the surest cause first. The tables of
docs/reading-curves.md and docs/broken-runs.md are these rules in prose, with the curves that they come from.
Thresholds were chosen on seeds 0 and 1 of default runs and seed 0 of the broken ones, and tried on others:
bench/doctor.py.
"""

import math
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

from nanorlhf.errors import UserError, reason_of, visible
from nanorlhf.hub.files import read_json
from nanorlhf.look.tokens import read as read_tokens
from nanorlhf.run.folders import read_rows

TREND = 10  # rows; in a shorter run a fifth would be one row, and a trend would be noise
PATIENCE = 25  # rows, before which nobody can say that rewards do not rise
SURE = 4  # standard errors; three are passed by chance in one of 400 columns, four in one of 16,000
# What the files of a run may raise that a crash or another version damaged.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
              MemoryError, UserError)  # fmt: skip
LOG_2 = math.log(2)  # the loss of a pair of which nothing is known


class Row(dict):
    """One step of metrics.csv. A cell that is empty or absent is NaN, of which every comparison is false."""

    def __missing__(self, name):
        return math.nan

    __getattr__ = dict.__getitem__  # row.kl is row["kl"]


class Run:
    """A run as the rules see it.

    flags   of config.json; one that the trainer does not have is NaN
    rows    every step that was logged
    start   the first of them
    early   means over the first fifth of them; empty in a run too short for a trend
    late    the same over the last fifth
    noise   by how much the rewards of two fifths may differ by chance
    tokens  records of tokens.jsonl.gz
    """

    def __init__(self, rows, config, tokens):
        self.flags = Row(config)
        self.rows = [Row({name: x for name, x in row.items() if x is not None}) for row in rows]
        self.tokens = tokens
        self.start = self.rows[0] if rows else Row()
        self.early = Row()
        self.late = Row()
        fifth = max(1, len(rows) // 5)
        if len(rows) >= TREND:
            self.early = means(self.rows[:fifth])
            self.late = means(self.rows[-fifth:])
        self.noise = SURE * self.early.reward_se * math.sqrt(2 / fifth)

    def first(self, holds):
        """→ the first row where this holds at step 0, else none."""
        return self.rows[:1] if holds and self.start.step == 0 else []

    def all(self, holds):
        """→ all rows where this holds of the run, else none."""
        return self.rows if holds and self.late else []

    def where(self, holds):
        """→ the rows of which this holds."""
        return [row for row in self.rows if holds(row)]


def column(rows, name):
    return [row[name] for row in rows if math.isfinite(row[name])]


def means(rows):
    """→ a Row: the mean of every column, over the rows that have it."""
    names = {name for row in rows for name in row}
    return Row({name: statistics.fmean(column(rows, name) or [math.nan]) for name in names})


# ------------------------------------------------------------------------------------------------------------
# step 0: what must hold before anything is learnt


def one_late(run):
    """Half a nat a token before any update: neither rounding nor a temperature moves log-probs so far."""
    return run.first(run.start.gap > 1 and run.start.kl > 0.5 * run.start.len)


def ratio_is_off(run):
    """Rounding is 1e-6 in fp32; bf16 moves single log-probs by up to a tenth or so."""
    rounding = 1e-4 if run.flags.dtype == "float32" else 0.5
    return run.first(run.start.gap > rounding and not one_late(run))


def other_temperature(run):
    return ratio_is_off(run) if run.flags.temperature != 1 else []


def not_as_sampled(run):
    return ratio_is_off(run) if run.flags.temperature == 1 and not no_eos(run) else []


def not_the_reference(run):
    """Where --ref is --init: two copies of one model differ by rounding, 1e-6 nats in fp32, 1e-2 in bf16.

    In bf16 it grows with the response: 2e-3 nats for each of its tokens.
    """
    rounding = 1e-3 if run.flags.dtype == "float32" else max(0.1, 2e-3 * run.start.len)
    same = run.flags.ref == run.flags.init and not ratio_is_off(run)
    return run.first(same and abs(run.start.kl) > rounding and not one_late(run))


def no_eos(run):
    """The loss counts tok_s · s tokens. As many are missing as responses have ended with EOS, within 1%."""
    samples = run.flags.prompts_per_step * run.flags.group_size
    ended = samples * run.start.stop
    missing = samples * run.start.len - run.start.tok_s * run.start.s
    others_too = run.flags.dead_groups in ("drop", "refill")
    return run.first(ended > 0 and abs(missing - ended) < 0.01 * ended and not others_too)


def other_prompt(run):
    """Both are samples of one policy. Held-out files of one's own may be harder, the task's are not."""
    apart = abs(run.start.reward - run.start["eval/reward"])
    chance = SURE * math.sqrt(2) * run.start.reward_se
    return run.first("ratio_max" in run.start and apart > chance > 0 and run.flags.eval_data == "")


def other_baseline(run):
    """In its own group an advantage is r − mean, whatever divides it: a group's sum is 0, to a fiftieth.

    Baselines such as those of OPO and ReMax leave another sum, but equal rewards have equal advantages.
    """
    rows = []
    for record in run.tokens:
        groups = {}
        columns = record.get("groups", {})
        table = zip(columns.get("group", ()), columns.get("reward", ()), columns.get("adv", ()))
        for group, reward, adv in table:
            groups.setdefault(group, []).append((reward, adv or 0))  # null where it is not finite
        if any(map(mixed_up, groups.values())) and run.flags.norm != "batch_whiten":
            rows.append(Row(step=record["step"]))
    return rows


def mixed_up(pairs):
    """[(reward, advantage)] of a group: the sum is not 0, and two equal rewards have unlike advantages."""
    total = sum(adv for _, adv in pairs)
    unit = 0.02 * sum(abs(adv) for _, adv in pairs)
    by_reward = {}
    for reward, adv in pairs:
        by_reward.setdefault(reward, []).append(adv)
    return abs(total) > unit and any(max(advs) - min(advs) > unit for advs in by_reward.values())


def half_dead(run):
    """Of pairs of equally good samples half are dead, give or take; default runs start below one in ten."""
    return run.first(run.start.dead > 0.4 and "teacher" not in run.flags)


def too_large(run):
    """The learning rate is still warming up. Default runs clip below 3%, with ratios below 1.7.

    GSPO's range is so narrow that it clips a tenth of the tokens or more by design.
    """
    moved_far = run.start.clip > 0.05 or run.start.ratio_max > 2.2
    moved_far = moved_far and run.flags.ratio != "sequence"
    return run.first(moved_far and not ratio_is_off(run) and not one_late(run))


def not_log_2(run):
    """Policy and reference are one model then: the loss is −log σ(0), in bf16 to a percent."""
    same = run.flags.loss == "dpo" and run.flags.ref == run.flags.init
    return run.first(same and abs(run.start.loss - LOG_2) > 1e-2)


# ------------------------------------------------------------------------------------------------------------
# reinforcement learning


def too_small(run):
    """Nothing moves. With one update a rollout the ratio is 1 by construction: then the KL alone tells."""
    kls = column(run.rows, "kl")
    ratios = column(run.rows, "ratio_max")
    still = ratios and max(ratios) < 1.01 and kls and max(kls) < 0.01
    return run.all(still and run.late.gnorm > 0)


def recomputed(run):
    """A policy that moves, by a KL of 0.01 or more, has a ratio in the second update of a rollout."""
    ones = run.where(lambda row: row.ratio_max == 1)
    several = run.flags.epochs * run.flags.minibatches > 1
    return run.all(several and len(ones) == len(run.rows) and run.late.kl > 0.01)


def overpays(run):
    """Whoever maximises reward − β·KL pays at most what the reward has gained. PPO logs its β."""
    gained = run.late.reward - run.start.reward + SURE * run.start.reward_se
    dear = price(run) > max(gained, 0) and run.late.kl > 0.5
    return "ratio_max" in run.start and dear and not learns_to_end(run)


def learns_to_end(run):
    """With --no_eos_score a response that ends is worth more, which the column reward does not show."""
    scored = run.flags.get("no_eos_score") is not None
    return scored and run.late.stop > run.start.stop + 0.05


def price(run):
    """β·KL of the last fifth, in units of the reward; 0 where no KL is charged.

    In the loss it is weighed against advantages that most norms have divided by the rewards' deviation.
    """
    if run.flags.kl == "none":
        return 0
    beta = run.late.beta if "beta" in run.late else run.flags.beta
    in_loss = run.flags.kl_in == "loss" or run.flags.kl == "exact"
    if in_loss and run.flags.norm not in ("none", "leave_one_out"):
        beta *= run.early.reward_se * math.sqrt(run.flags.prompts_per_step * run.flags.group_size)
    return beta * run.late.kl


def is_k1_in_loss(run):
    return run.flags.kl == "k1" and run.flags.kl_in == "loss" and not run.flags.kl_unbiased


def k1_in_loss(run):
    return run.all(overpays(run) and is_k1_in_loss(run))


def kl_sign(run):
    return run.all(overpays(run) and not is_k1_in_loss(run))


def falls(run):
    lost = run.start.reward - run.late.reward
    return "ratio_max" in run.start and lost > SURE * run.start.reward_se and not learns_to_end(run)


def too_short(run):
    return run.all(falls(run) and run.flags.overlong_penalty > 0 and run.late.len < run.start.len)


def wrong_sign(run):
    """No step is better than the first by more than chance, and likely tokens have become unlikely."""
    best = run.start.reward + SURE * run.start.reward_se
    never_rose = not run.where(lambda row: row.reward > best)
    more_random = run.late.entropy > 1.2 * run.start.entropy
    return run.all(falls(run) and never_rose and more_random and not too_short(run))


def ignored_ratio(run):
    """A token that is twice as likely as when it was sampled is another policy's sample."""
    return run.where(lambda row: run.flags.loss == "reinforce" and row.ratio_max > 2)


def clipped(run):
    """Default runs stay below 3%; above 10% the tokens that moved most have no gradient. GSPO clips more."""
    return run.where(lambda row: row.clip > 0.1 and run.flags.ratio != "sequence")


def stale(run):
    return clipped(run) if run.flags.off_policy_steps > 0 else []


def reused(run):
    known = run.flags.off_policy_steps > 0 or one_late(run) or too_large(run)
    return [] if known else clipped(run)


def not_cleared(run):
    """Dead groups have no gradient: where most are dead the norm is small, unless old gradients remain."""
    large = run.where(lambda row: row.gnorm > run.flags.max_grad_norm)
    only_from_reward = run.flags.kl == "none" and run.flags.entropy_coef == 0
    return run.all(only_from_reward and len(large) == len(run.rows) and run.late.dead > 0.5)


def collapsed(run):
    """All groups score alike, and lower than at the start, or in the mean of the first fifth."""
    before = max(run.start.reward, run.early.reward)
    return run.all(run.late.dead > 0.95 and run.late.reward < before - run.noise)


def flat(run):
    """The reward has not changed by more than chance, although there are groups to learn from.

    In the first two dozen steps, of warm-up in part, a healthy run is flat as well.
    """
    change = abs(run.late.reward - run.early.reward)
    alive = "ratio_max" in run.start and not run.early.dead > 0.5
    return alive and change < run.noise and not one_late(run) and len(run.rows) >= PATIENCE


def held_back(run):
    return run.all(flat(run) and price(run) > 0 and run.late.kl < 1)


def nothing_to_select(run):
    """The policy moves: 0.05 nats are some hundred times what a KL of 0 looks like in a default run."""
    moves = price(run) == 0 and run.late.kl > 0.05
    return run.all(flat(run) and moves)


def never_ends(run):
    """One in five more is cut than at the start; default runs change by one in fifty."""
    return run.all(run.late.stop < run.start.stop - 0.2)


def shrinks(run):
    """A third of what SFT wrote: default runs on free text keep within a fifth."""
    return run.all(run.late.len < run.start.len / 3)


def far_off(run):
    """One nat a token: on average the reference gives a token e⁻¹ of the policy's probability."""
    near_at_first = run.start.kl < 0.5 * run.start.len
    return run.where(lambda row: near_at_first and row.kl > row.len)


def poor_critic(run):
    """A constant critic has 0. Where rewards hardly vary any more, any error of the critic is below it."""
    varies = run.late.reward_se > 0.5 * run.early.reward_se
    return run.all(varies and run.late.explained_var < -0.3)


def reward_fails(run):
    """Fewer are a slow machine; from one in twenty on the curve is another one."""
    return run.where(lambda row: row.reward_failed > 0.05)


# ------------------------------------------------------------------------------------------------------------
# learning from examples, from pairs and from a teacher


def diverges(run):
    """A loss a tenth above where it began is worse than knowing nothing. With --as_reward it is noise."""
    return run.all(run.late.loss > 1.1 * run.start.loss and run.flags.as_reward is not True)


def swapped(run):
    """One half, less four standard errors of a fifth of a hundred steps of 32 pairs."""
    return run.all(run.late.acc < 0.42)


def undecided(run):
    """Both: DPO's losses have other scales, and noisy labels leave a loss near log 2 that does rank pairs."""
    return run.all(abs(run.late.loss - LOG_2) < 0.01 and abs(run.late.acc - 0.5) < 0.08)


def memorises(run):
    """One held-out loss differs from the next by up to 2% in default runs."""
    held_out = column(run.rows, "eval/loss")
    worse = held_out and held_out[-1] > 1.05 * min(held_out)
    return run.all(worse and run.late.loss < run.early.loss)


def only_length(run):
    """Of 500 held-out pairs; two hundredths are one standard error."""
    return run.all(run.late["eval/acc"] < run.late["eval/acc_len_only"] + 0.02)


def no_headway(run):
    """SFT's loss falls at once, and so does the KL to a teacher, which is distillation's."""
    return run.all("acc" not in run.start and run.late.loss > 0.97 * run.start.loss)


def plateau(run):
    """Of chain: 1.05 while only the formats are learnt, 0.35 with the sums. SFT is the one with --demos."""
    return run.all("demos" in run.flags and run.flags.task == "chain" and run.late.loss > 0.8)


def own_prefixes(run):
    """It falls by a tenth at least where the KL of the training texts does."""
    held_out = column(run.rows, "eval/kl")
    worse = held_out and held_out[-1] > 0.9 * held_out[0]
    return run.all(worse and run.late.loss < 0.9 * run.start.loss)


# ------------------------------------------------------------------------------------------------------------
# the words


class Rule(NamedTuple):
    shows: object  # function of a Run → the rows in which the fault shows
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
    Rule(no_eos, "len stop tok_s s", "EOS is outside the mask",
         "As many tokens are missing from the loss as there are responses that ended: nobody learns to stop.",
         "Make the mask from lengths, never from token ids.",
         "broken-runs.md"),
    Rule(not_as_sampled, "gap ratio_max kl", "Sampling and scoring disagree: the ratio is not 1 at step 0",
         "The log-probs of the sampler are not those of the loss: dropout, dtype, a shift, or old weights.",
         "Score with the sampler's weights, temperature and dtype; switch dropout off.",
         "04-grpo.md"),
    Rule(not_the_reference, "kl", "The reference is not the policy that the run starts from",
         "KL at step 0 must be 0: both were read from the same folder.",
         "Load the reference before the first update, in the policy's dtype, and freeze it.",
         "00-notation.md"),
    Rule(other_prompt, "reward eval/reward", "Rewards are judged by another prompt",
         "The same policy scores differently on training and held-out prompts before the first update.",
         "Compare the prompt of each sample in samples.jsonl with the row that its reward was given.",
         "broken-runs.md"),
    Rule(other_baseline, "", "The baseline is that of other prompts",
         "Over a group the advantages must sum to 0, and they do not: rewards and groups do not match.",
         "Permute the prompts: the advantages must follow.",
         "broken-runs.md"),
    Rule(half_dead, "dead", "Too few samples a prompt: many groups are dead",
         "All samples of a dead group score the same: their advantages are 0, and they teach nothing.",
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
         "Fewer --epochs or --minibatches, a smaller --lr.",
         "05-ppo.md"),
    Rule(not_cleared, "gnorm dead", "Gradients are never cleared",
         "Most groups are dead and give no gradient, yet its norm is above --max_grad_norm in every step.",
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
         "More than a nat of KL a token. Reward, or loss of the pairs, no longer says what a text is worth.",
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
         "--on_policy true.",
         "07-distill.md"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# findings


def diagnose(rows, config, tokens=()):
    """What is read from the files of a run folder → findings, the surest cause first.

    A finding is a dict: title, steps (in which it shows, with the values there), meaning, remedy, page (its
    path in the repository).
    """
    run = Run(rows, config, tokens)
    found = []
    for rule in RULES:
        shown_in = rule.shows(run)
        if shown_in:
            finding = {
                "title": rule.title,
                "steps": span(shown_in, rule.columns.split()),
                "meaning": rule.meaning,
                "remedy": rule.remedy,
                "page": f"docs/{rule.page}",
            }
            found.append(finding)
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
    return f"{steps}: {', '.join(values)}" if values else steps


def findings(run_folder):
    """What the rules find in a run folder: the list of `diagnose`; UserError without metrics.csv."""
    config = read_json(Path(run_folder, "config.json"))
    return diagnose(read_rows(run_folder), config, read_tokens(run_folder))


def counted(found):
    return {0: "nothing found", 1: "1 finding"}.get(len(found), f"{len(found)} findings")


def try_findings(run_folder):
    """`findings` at the end of a run. Of a log that was damaged: None, and a line that says why.

    It must not end a run that is whole.
    """
    try:
        return findings(run_folder)
    except UNREADABLE as e:
        print(f"doctor: {run_folder} could not be read ({reason_of(e)})")


def summary(run_folder, found):
    """What a trainer prints at its end: a line, and how to read on where there is something to read."""
    if not found:
        return f"doctor: {counted(found)}"
    command = f"python -m nanorlhf.look --doctor {run_folder}"
    return visible(f"doctor: {found[0]['title']}\n  {counted(found)}: {command}")


def main(run_folder):
    """Print the findings in a run folder within 80 columns. Nothing in them is an error of this program."""
    found = findings(run_folder)
    print(visible(f"{run_folder}: {counted(found)}"))
    for i, finding in enumerate(found, start=1):
        print(f"\n{i}. {finding['title']}")
        for words in (finding["steps"], finding["meaning"], f"Try: {finding['remedy']}", finding["page"]):
            print(textwrap.fill(words, 80, initial_indent="   ", subsequent_indent="   "))
