"""Built-in tasks: prompts, demonstrations, rewards. All of it is generated, so there is nothing to download.

    reviews     continue a review; the reward is a model learnt from preferences     (RLHF, DPO)
    chain       sum of six digits mod 10, answered at once or after thinking         (GRPO, length curve)
    countdown   reach a target with three numbers                                    (GRPO, pass@k)

The text of a sample is the prompt and then the response; the tokenizer's EOS ends the response. The prompt's
text alone decides whether it is for training or for testing (`held_out`), so no seed can mix the two.
"""

import hashlib
import itertools
import math
import random
import re

from nanorlhf.errors import require

OWN_REWARD = "prompts of your own need --reward my_reward.py:score"


def held_out(prompt: str) -> bool:
    """True for the 15% of all prompts that are kept for testing, by a hash of the text."""
    digest = hashlib.sha256(prompt.encode(errors="replace")).hexdigest()
    return int(digest[:8], 16) < 0.15 * 2**32


class Task:
    """What the trainers use of a task. A subclass adds `_draw`: it draws one {"prompt", "response", ...}."""

    name: str
    tokenizer: str  # "bpe": trained on the demonstrations; "chars": one token per character of `alphabet`
    alphabet: str  # every character that occurs in a prompt or a demonstration ("" with "bpe")
    max_new_tokens: int  # room for the longest demonstration and its EOS
    reward = None  # or a method: reward(prompt, response, row=None) -> float

    def prompts(self, split, n, seed):
        """Draw n rows {"prompt": str, ...} of the split "train" or "test", with replacement."""
        require(split in ("train", "test"), f"split {split!r}: choose train or test")
        rows = self._rows(split, n, f"{self.name} prompts {split} {seed}")
        for row in rows:
            del row["response"]
        return rows

    def demonstrations(self, n, seed, split="train"):
        """Draw n rows {"prompt": str, "response": str} for SFT; split "test" is for its held-out loss."""
        rows = self._rows(split, n, f"{self.name} demonstrations {split} {seed}")
        return [{"prompt": row["prompt"], "response": row["response"]} for row in rows]

    def gate(self, prompts, responses):
        """None if RL can start from a policy that gives these samples, else a sentence that says why not."""
        return None

    def _rows(self, split, n, seed):
        rng = random.Random(seed)
        rows = []
        while len(rows) < n:
            row = self._draw(rng)
            if held_out(row["prompt"]) == (split == "test"):
                rows.append(row)
        return rows


# ------------------------------------------------------------------------------------------------------------
# reviews: a small English, and a hidden judge of it

TOPICS = {
    "Restaurant": "soup waiter dessert menu wine".split(),
    "Hotel": "room bed breakfast pool view".split(),
    "Film": "plot acting script cast ending".split(),
    "Concert": "band singer sound stage crowd".split(),
    "Museum": "guide tour shop garden collection".split(),
}
ADJECTIVES = {
    "wonderful": 3, "superb": 3,
    "great": 2, "lovely": 2, "delightful": 2,
    "good": 1, "nice": 1, "decent": 1,
    "dull": -1, "ordinary": -1, "forgettable": -1,
    "bad": -2, "poor": -2, "disappointing": -2,
    "awful": -3, "terrible": -3,
}  # fmt: skip
ADVERBS = {"really": 1.2, "truly": 1.2, "quite": 0.8, "rather": 0.7}
VERBS = {"loved": 3, "enjoyed": 2, "liked": 1, "disliked": -2, "hated": -3}
VERDICTS = {"would": 2, "would gladly": 2.5, "would not": -2, "would never": -2.5}
PERSONS = ("I", "We")
NEUTRAL = {
    "day": ("{} went on a {}.", "I We", "Monday Friday Sunday"),
    "company": ("{} went with my {}.", "I We", "sister brother friend"),
    "weather": ("It was a {} {}.", "rainy sunny", "morning evening"),
    "stay": ("{} stayed until the {}.", "I We", "evening end"),
}


def _build_sayings():
    """The whole language → {subject: groups of sentences about it, each a dict {sentence: sentiment}}."""
    qualified = {}  # "really great": 2.4
    for adverb, factor in ADVERBS.items():
        for adjective, sentiment in ADJECTIVES.items():
            qualified[f"{adverb} {adjective}"] = factor * sentiment
    adjectives = ADJECTIVES | qualified
    verbs = dict(VERBS)
    for verb, sentiment in VERBS.items():
        verbs[f"really {verb}"] = ADVERBS["really"] * sentiment

    sayings = {}
    for aspects in TOPICS.values():
        for aspect in aspects:
            sayings[aspect] = [
                {f"The {aspect} was {adj}.": s for adj, s in ADJECTIVES.items()},
                {f"The {aspect} was {adj}.": s for adj, s in qualified.items()},
                {f"{who} found the {aspect} {adj}.": s for who in PERSONS for adj, s in adjectives.items()},
                {f"{who} {verb} the {aspect}.": s for who in PERSONS for verb, s in verbs.items()},
            ]
    for subject, (pattern, first, second) in NEUTRAL.items():
        texts = [pattern.format(x, y) for x in first.split() for y in second.split()]
        sayings[subject] = [dict.fromkeys(texts, 0.0)]
    sayings["verdict"] = [
        {f"{who} {would} {act}.": s for who in PERSONS for would, s in VERDICTS.items()}
        for act in ("go again", "recommend it")
    ]
    return sayings


# All 6,500 sentences are listed, with sentiments of about ±3. The generator picks from SAYINGS and the judge
# looks up in SENTENCES, which is made of it, so the two cannot drift apart.
SAYINGS = _build_sayings()
SENTENCES = {
    text: (subject, sentiment)
    for subject, groups in SAYINGS.items()
    for group in groups
    for text, sentiment in group.items()
}


def _say(subject, mood, rng):
    # Rejection sampling: a uniform sentence, kept with probability exp(-(sentiment - mood)² / 2).
    # Without the clamp, a mood of 60 would reject every sentence for minutes.
    mood = max(-3.0, min(3.0, mood))
    group = list(rng.choice(SAYINGS[subject]).items())
    while True:
        text, sentiment = rng.choice(group)
        if subject in NEUTRAL or rng.random() < math.exp(-0.5 * (sentiment - mood) ** 2):
            return text


class Reviews(Task):
    """`Hotel: The bed was rather dull.` → ` I loved the view. We went on a Friday. ...`, mostly sour.

    Each review has one hidden mood and 3 to 6 sentences, each about a new subject. RLHF should lift the mood
    and keep the English; `gold` measures both. The reward is a model trained on pairs labelled by `prefer`.
    """

    name = "reviews"
    tokenizer = "bpe"
    alphabet = ""
    max_new_tokens = 40

    def _draw(self, rng):
        mood = rng.gauss(-0.9, 2.8)
        topic = rng.choice(list(TOPICS))
        aspects = rng.sample(TOPICS[topic], 5)
        length = rng.choices((3, 4, 5, 6), (15, 40, 30, 15))[0]
        ends_with_verdict = rng.random() < 0.5
        if ends_with_verdict:
            length -= 1
        first = aspects.pop(0)  # the prompt's subject
        neutral = sum(rng.random() < 0.3 for _ in range(length))
        neutral = max(neutral, length - len(aspects))
        neutral = min(neutral, len(NEUTRAL))
        subjects = aspects[: length - neutral] + rng.sample(list(NEUTRAL), neutral)
        rng.shuffle(subjects)
        if ends_with_verdict:
            subjects.append("verdict")
        # The prompt has a mood of its own near the response's: it hints at the response and does not fix it.
        prompt = f"{topic}: {_say(first, mood + rng.gauss(0, 1.5), rng)}"
        sentences = [_say(subject, mood, rng) for subject in subjects]
        return {"prompt": prompt, "response": " " + " ".join(sentences)}


def gold_parts(prompt, response):
    """What `gold` sees → {"sentences": number, "sentiment": mean, "ill_formed": share, "repeated": share}.

    A sentence follows one space and ends at its full stop. Ill-formed is a sentence outside the language or
    about another topic, and text without a full stop. Repeated is a sentence about a subject (an aspect, the
    day, ... the verdict) that an earlier sentence was about, the prompt's included. Both have no sentiment
    but count in the mean's denominator: otherwise a salad of kind words would be the best review.
    """
    topic, _, first = prompt.partition(": ")
    known = topic in TOPICS
    require(known, f"--task reviews: {prompt!r} does not begin with {', '.join(TOPICS)} and a colon")
    fitting = {*TOPICS[topic], *NEUTRAL, "verdict"}
    nothing = (None, 0.0)  # the subject and the sentiment of a text that is no sentence
    subjects = {SENTENCES.get(first, nothing)[0]}
    pieces = re.findall(r"[^.]*\.|[^.]+", response)
    sentiment = 0.0
    ill_formed = 0
    repeated = 0
    for piece in pieces:
        subject, score = SENTENCES.get(piece[1:], nothing)
        if not piece.startswith(" ") or subject not in fitting:
            ill_formed += 1
        elif subject in subjects:
            repeated += 1
        else:
            subjects.add(subject)
            sentiment += score
    n = max(len(pieces), 1)
    return {
        "sentences": len(pieces),
        "sentiment": sentiment / n,
        "ill_formed": ill_formed / n if pieces else 1.0,
        "repeated": repeated / n,
    }


def gold(prompt: str, response: str) -> float:
    """Hidden judge of a review, within [-6, 3.4]: it labels pairs and judges results; no trainer may call it.

    Mean sentiment - 2 (share ill-formed) - 2 (share repeated) - 0.5 per sentence above 5 - 0.7 per sentence
    below 4. The lower bound keeps a few degenerate samples from ruling a mean.
    """
    parts = gold_parts(prompt, response)
    too_many = max(0, parts["sentences"] - 5)
    too_few = max(0, 4 - parts["sentences"])
    score = parts["sentiment"] - 2 * parts["ill_formed"] - 2 * parts["repeated"]
    score -= 0.5 * too_many + 0.7 * too_few
    return max(score, -6.0)


def prefer(prompt, a, b, rng, tau):
    """Label a pair by a Bradley–Terry draw → (chosen, rejected): P(a chosen) = σ((gold(a) - gold(b)) / tau).

    tau = 0 gives the exact order of gold, and a coin decides ties.
    """
    gap = gold(prompt, a) - gold(prompt, b)
    if tau > 0:
        p = 0.5 + 0.5 * math.tanh(gap / tau / 2)  # = σ(gap / tau), and cannot overflow
    elif gap == 0:
        p = 0.5
    else:
        p = float(gap > 0)
    return (a, b) if rng.random() < p else (b, a)


# ------------------------------------------------------------------------------------------------------------
# chain: think, or guess


class Chain(Task):
    """`697470=` → `|3` or `<652633>|3`: the digits' sum mod 10, at once or after the running sums mod 10.

    After SFT the direct answer is at chance and the thinking one is right, but only a third of the samples
    think; RL finds out that thinking pays. The `|` gives the direct answer one first token, as "<" is that of
    the thinking one. Spread over ten digits it would be less likely than "<", and greedy decoding would think
    before any RL.
    """

    name = "chain"
    tokenizer = "chars"
    alphabet = "0123456789=<>|"
    max_new_tokens = 11

    def _draw(self, rng):
        digits = [rng.randrange(10) for _ in range(6)]
        sums = "".join(str(s % 10) for s in itertools.accumulate(digits))
        thought = f"<{sums}>" if rng.random() < 0.35 else ""
        answer = sums[-1]
        prompt = "".join(map(str, digits)) + "="
        return {"prompt": prompt, "answer": answer, "response": f"{thought}|{answer}"}

    def reward(self, prompt: str, response: str, row: dict | None = None) -> float:
        """1 if the whole response is `|digit` or `<digits>|digit` and the last digit is right, else 0."""
        digits = re.fullmatch(r"[0-9]+=", prompt)
        require(digits, f"--task chain: the prompt {prompt!r} is not of this task; {OWN_REWARD}")
        answer = sum(map(int, prompt[:-1])) % 10
        # [0-9] and not \d, which takes Arabic and fullwidth digits too. Any thought will do: the answer pays.
        match = re.fullmatch(r"(<[0-9]*>)?\|([0-9])", response)
        return float(match is not None and int(match[2]) == answer)

    def thinks(self, response):
        return response.startswith("<")

    def gate(self, prompts, responses):
        """Running sums appear late in SFT, all at once. Before that RL has nothing better to select."""
        right = []
        for prompt, response in zip(prompts, responses, strict=True):
            if self.thinks(response):
                right.append(self.reward(prompt, response))
        thinking = len(right)
        share = sum(right) / max(thinking, 1)
        if thinking < 8:
            found = f"{thinking} of {len(responses)} sampled responses think (8 are needed)"
        elif share <= 0.9:
            found = f"{share:.3f} of the {thinking} sampled responses that think are right (not above 0.9)"
        else:
            return None
        return (
            f"--task chain: {found}: the policy has not passed SFT's phase transition, RL would be in vain; "
            "run python train_sft.py --task chain with more --steps"
        )


# ------------------------------------------------------------------------------------------------------------
# countdown: three numbers, one target


class Countdown(Task):
    """`3 7 2=13:` → `3*2+7`: reach the target with each number once, + - * and the usual precedence.

    Demonstrations are right about seven times in ten. A test prompt's numbers may occur in training in
    another order, with the same target: `held_out` hashes the text.
    """

    name = "countdown"
    tokenizer = "chars"
    alphabet = "0123456789 +-*=:"
    max_new_tokens = 6

    def _draw(self, rng):
        while True:
            numbers = [rng.randint(1, 9) for _ in range(3)]
            answer = self._expression(numbers, rng)
            target = self.value(answer)
            if 0 <= target <= 99:
                response = answer if rng.random() < 0.7 else self._expression(numbers, rng)
                prompt = f"{' '.join(map(str, numbers))}={target}:"
                return {"prompt": prompt, "answer": answer, "response": response}

    def _expression(self, numbers, rng):
        a, b, c = rng.sample(numbers, 3)
        return f"{a}{rng.choice('+-*')}{b}{rng.choice('+-*')}{c}"

    def value(self, expression):
        """The value of `digit op digit op digit`, * before + and -; None for any other text. No eval.

        >>> Countdown().value("7-3*2"), Countdown().value("13")
        (1, None)
        """
        if not re.fullmatch(r"[1-9][-+*][1-9][-+*][1-9]", expression):
            return None
        total = 0
        for sign, product in re.findall(r"([-+]?)([1-9*]+)", expression):
            value = math.prod(int(factor) for factor in product.split("*"))
            total += -value if sign == "-" else value
        return total

    def reward(self, prompt: str, response: str, row: dict | None = None) -> float:
        """1 if the response is one expression of exactly the prompt's numbers hitting the target, else 0."""
        match = re.fullmatch(r"([1-9]) ([1-9]) ([1-9])=([0-9]+):", prompt)
        require(match, f"--task countdown: the prompt {prompt!r} is not of this task; {OWN_REWARD}")
        *numbers, target = match.groups()
        hits_target = self.value(response) == int(target)
        uses_numbers = sorted(response[::2]) == sorted(numbers)
        return float(hits_target and uses_numbers)


TASKS = {task.name: task for task in (Reviews(), Chain(), Countdown())}


def get(name):
    """The task of this name. UserError, with the names there are, for any other."""
    require(name in TASKS, f"--task {name}: no such task; choose one of {', '.join(TASKS)}")
    return TASKS[name]
