"""Built-in tasks: prompts, demonstrations, rewards. Everything is generated, so nothing has to be downloaded.

    reviews     continue a review; the reward is a model learnt from preferences     (RLHF, DPO)
    chain       sum of six digits mod 10, answered at once or after thinking         (GRPO, length curve)
    countdown   reach a target with three numbers                                    (GRPO, pass@k)

In every task prompt + response, concatenated, is the text, and the tokenizer's EOS ends the response.
A prompt is for training or for testing by its text alone (`held_out`), so no seed can let the two meet.
"""

import hashlib
import itertools
import math
import random
import re

from nanorlhf.errors import UserError


def held_out(prompt: str) -> bool:
    """True for the ~15% of all prompts that are kept for testing; depends on nothing but the text."""
    return int(hashlib.sha256(prompt.encode(errors="replace")).hexdigest()[:8], 16) < 0.15 * 2**32


class Task:
    """What the trainers use of a task. A subclass adds `_draw`: one random {"prompt", "response", ...}."""

    name: str
    tokenizer: str  # "bpe": trained on the demonstrations; "chars": one token per character of `alphabet`
    alphabet: str  # every character that occurs in a prompt or a demonstration ("" with "bpe")
    max_new_tokens: int  # the longest demonstration and its EOS fit
    reward = None  # or a method reward(prompt, response, row=None) -> float

    def prompts(self, split: str, n: int, seed: int) -> list[dict]:
        """n rows {"prompt": str, ...} of split "train" or "test", drawn with replacement."""
        if split not in ("train", "test"):
            raise UserError(f"split {split!r}: choose train or test")
        rows = self._rows(split, n, random.Random(f"{self.name} prompts {split} {seed}"))
        return [{key: row[key] for key in row if key != "response"} for row in rows]

    def demonstrations(self, n: int, seed: int, split: str = "train") -> list[dict]:
        """n rows {"prompt": str, "response": str}, for SFT ("test": for its held-out loss)."""
        rows = self._rows(split, n, random.Random(f"{self.name} demonstrations {split} {seed}"))
        return [{"prompt": row["prompt"], "response": row["response"]} for row in rows]

    def gate(self, prompts: list[str], responses: list[str]) -> str | None:
        """None when RL can start from a policy that gives these samples, else one sentence saying why not."""
        return None

    def _rows(self, split: str, n: int, rng: random.Random) -> list[dict]:
        rows: list[dict] = []
        while len(rows) < n:
            row = self._draw(rng)
            if held_out(row["prompt"]) == (split == "test"):
                rows.append(row)
        return rows

    def _draw(self, rng: random.Random) -> dict:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# reviews: a small English, and a hidden judge of it

TOPICS = {
    "Restaurant": ("soup", "waiter", "dessert", "menu", "wine"),
    "Hotel": ("room", "bed", "breakfast", "pool", "view"),
    "Film": ("plot", "acting", "script", "cast", "ending"),
    "Concert": ("band", "singer", "sound", "stage", "crowd"),
    "Museum": ("guide", "tour", "shop", "garden", "collection"),
}
ADJECTIVES = {
    "wonderful": 3, "superb": 3, "great": 2, "lovely": 2, "delightful": 2, "good": 1, "nice": 1, "decent": 1,
    "dull": -1, "ordinary": -1, "forgettable": -1, "bad": -2, "poor": -2, "disappointing": -2, "awful": -3,
    "terrible": -3,
}
ADVERBS = {"really": 1.2, "truly": 1.2, "quite": 0.8, "rather": 0.7}
VERBS = {"loved": 3, "enjoyed": 2, "liked": 1, "disliked": -2, "hated": -3}
VERDICTS = {"would": 2, "would gladly": 2.5, "would not": -2, "would never": -2.5}
PERSONS = ("I", "We")


def _about_aspect(aspect: str) -> list[dict[str, float]]:
    qualified = {f"{adv} {adj}": ADVERBS[adv] * ADJECTIVES[adj] for adv in ADVERBS for adj in ADJECTIVES}
    adjectives = ADJECTIVES | qualified
    verbs = VERBS | {f"really {verb}": ADVERBS["really"] * VERBS[verb] for verb in VERBS}
    return [
        {f"The {aspect} was {adj}.": s for adj, s in ADJECTIVES.items()},
        {f"The {aspect} was {adj}.": s for adj, s in qualified.items()},
        {f"{who} found the {aspect} {adj}.": s for who in PERSONS for adj, s in adjectives.items()},
        {f"{who} {verb} the {aspect}.": s for who in PERSONS for verb, s in verbs.items()},
    ]


def _neutral(pattern: str, *slots: str) -> list[dict[str, float]]:
    return [{pattern.format(*words): 0.0 for words in itertools.product(*(slot.split() for slot in slots))}]


NEUTRAL = {
    "day": _neutral("{} went on a {}.", "I We", "Monday Friday Sunday"),
    "company": _neutral("{} went with my {}.", "I We", "sister brother friend"),
    "weather": _neutral("It was a {} {}.", "rainy sunny", "morning evening"),
    "stay": _neutral("{} stayed until the {}.", "I We", "evening end"),
}
# SAYINGS[subject]: groups of sentences about it, each sentence with its sentiment, in units of about ±3.
# The whole language is enumerated (6,500 sentences): the generator picks from these tables and the judge
# looks up in them, so the two cannot drift apart.
SAYINGS = {aspect: _about_aspect(aspect) for aspects in TOPICS.values() for aspect in aspects}
SAYINGS |= NEUTRAL
SAYINGS["verdict"] = [
    {f"{who} {would} {act}.": s for who in PERSONS for would, s in VERDICTS.items()}
    for act in ("go again", "recommend it")
]
SENTENCES = {
    text: (subject, sentiment)
    for subject, groups in SAYINGS.items()
    for group in groups
    for text, sentiment in group.items()
}


def _say(subject: str, mood: float, rng: random.Random) -> str:
    # Rejection sampling: a uniform sentence, kept with probability exp(-(sentiment - mood)² / 2).
    # Without the clamp, a mood far outside all sentiments would reject for minutes.
    mood = max(-3.0, min(3.0, mood))
    group = list(rng.choice(SAYINGS[subject]).items())
    while True:
        text, sentiment = rng.choice(group)
        if subject in NEUTRAL or rng.random() < math.exp(-0.5 * (sentiment - mood) ** 2):
            return text


class Reviews(Task):
    """`Hotel: The bed was rather dull.` → ` I loved the view. We went on a Friday. ...`, mostly sour.

    One latent mood a review, 3 to 6 new sentences, nothing said twice. RLHF should lift the mood and keep the
    English; `gold` measures both. The reward is a model trained on pairs labelled by `prefer`.
    """

    name, tokenizer, alphabet, max_new_tokens = "reviews", "bpe", "", 40

    def _draw(self, rng):
        mood = rng.gauss(-0.9, 2.8)
        topic = rng.choice(list(TOPICS))
        first, *others = rng.sample(TOPICS[topic], 5)
        count = rng.choices((3, 4, 5, 6), (15, 40, 30, 15))[0]
        ending = rng.random() < 0.5
        body = count - ending
        neutral = max(body - len(others), sum(rng.random() < 0.3 for _ in range(body)))
        neutral = min(neutral, len(NEUTRAL))
        subjects = others[: body - neutral] + rng.sample(list(NEUTRAL), neutral)
        rng.shuffle(subjects)
        subjects += ["verdict"] * ending
        # A blurred mood for the first sentence: the prompt hints at the response's mood and does not fix it.
        prompt = f"{topic}: {_say(first, mood + rng.gauss(0, 1.5), rng)}"
        return {"prompt": prompt, "response": "".join(f" {_say(subject, mood, rng)}" for subject in subjects)}


def well_formed(prompt: str, sentence: str) -> bool:
    """Whether `sentence` ("The bed was dull.") is of the language and fits the prompt's topic."""
    subject = SENTENCES.get(sentence, (None,))[0]
    return subject in TOPICS[_split(prompt)[0]] or subject in NEUTRAL or subject == "verdict"


def gold_parts(prompt: str, response: str) -> dict:
    """What `gold` sees: number of sentences, mean sentiment, shares of ill-formed and of repeated ones.

    A sentence ends at its full stop and follows one space; unended text is one ill-formed sentence, and so
    is one about another topic. Repeated is what speaks of a subject (an aspect, the day, ... the verdict)
    once more, the prompt's sentence included. Neither earns any sentiment, but both count in the mean's
    denominator: otherwise word salad of kind words would be the best review.
    """
    first = _split(prompt)[1]
    said = {SENTENCES.get(first, (None,))[0]}
    pieces = re.findall(r"[^.]*\.|[^.]+", response)
    sentiment, ill, repeated = 0.0, 0, 0
    for piece in pieces:
        if not piece.startswith(" ") or not well_formed(prompt, piece[1:]):
            ill += 1
            continue
        subject, score = SENTENCES[piece[1:]]
        if subject in said:
            repeated += 1
        else:
            said.add(subject)
            sentiment += score
    n = max(len(pieces), 1)
    return {
        "sentences": len(pieces),
        "sentiment": sentiment / n,
        "ill_formed": ill / n if pieces else 1.0,
        "repeated": repeated / n,
    }


def gold(prompt: str, response: str) -> float:
    """Hidden judge of a review, within [-6, 3.4]: labels pairs and judges results; no trainer may call it.

    Mean sentiment - 2 (share ill-formed) - 2 (share repeated) - 0.5 per sentence above 5 - 0.7 per sentence
    below 4. The lower bound keeps a few degenerate samples from ruling a mean.
    """
    parts = gold_parts(prompt, response)
    score = parts["sentiment"] - 2 * parts["ill_formed"] - 2 * parts["repeated"]
    score -= 0.5 * max(0, parts["sentences"] - 5) + 0.7 * max(0, 4 - parts["sentences"])
    return max(score, -6.0)


def prefer(prompt: str, a: str, b: str, rng: random.Random, tau: float = 1.0) -> tuple[str, str]:
    """(chosen, rejected) by a Bradley–Terry draw: P(a is chosen) = σ((gold(a) - gold(b)) / tau).

    tau = 0 is the exact order of gold, ties by coin.
    """
    gap = gold(prompt, a) - gold(prompt, b)
    if tau == 0:
        p = 0.5 if gap == 0 else float(gap > 0)
    else:
        p = 0.5 + 0.5 * math.tanh(gap / tau / 2)  # = σ(gap / tau), and cannot overflow
    return (a, b) if rng.random() < p else (b, a)


def _split(prompt: str) -> tuple[str, str]:
    topic, _, first = prompt.partition(": ")
    if topic not in TOPICS:
        raise UserError(f"--task reviews: {prompt!r} does not begin with {', '.join(TOPICS)} and a colon")
    return topic, first


# ------------------------------------------------------------------------------------------------------------
# chain: think, or guess


class Chain(Task):
    """`697470=` → `|3` or `<652633>|3`: the digits' sum mod 10, at once or after the running sums mod 10.

    After SFT the direct answer is at chance and the thinking one is right, but only a third of the samples
    think: RL finds out that thinking pays. The `|` gives the direct style one first token, as the thinking
    style has: spread over ten digits it would lose to "<", and greedy decoding would be right before any RL.
    """

    name, tokenizer, alphabet, max_new_tokens = "chain", "chars", "0123456789=<>|", 11

    def _draw(self, rng):
        digits = [rng.randrange(10) for _ in range(6)]
        sums = "".join(str(s % 10) for s in itertools.accumulate(digits))
        thought = f"<{sums}>" if rng.random() < 0.35 else ""
        answer = sums[-1]
        prompt = "".join(map(str, digits)) + "="
        return {"prompt": prompt, "answer": answer, "response": f"{thought}|{answer}"}

    def reward(self, prompt: str, response: str, row: dict | None = None) -> float:
        """1 if the whole response is `|digit` or `<digits>|digit` and the last digit is right, else 0."""
        if not re.fullmatch(r"[0-9]+=", prompt):
            raise UserError(f"--task chain: the prompt {prompt!r} is not digits and a final =")
        answer = sum(map(int, prompt[:-1])) % 10
        # [0-9], not \d: that takes Arabic and fullwidth digits too. What is thought is free, the answer pays.
        match = re.fullmatch(r"(<[0-9]*>)?\|([0-9])", response)
        return float(match is not None and int(match[2]) == answer)

    def thinks(self, response: str) -> bool:
        return response.startswith("<")

    def gate(self, prompts: list[str], responses: list[str]) -> str | None:
        """Running sums appear late in SFT, all at once. Before that RL has no better mode to select."""
        right = [self.reward(p, r) for p, r in zip(prompts, responses, strict=True) if self.thinks(r)]
        share = sum(right) / max(len(right), 1)
        if len(right) >= 8 and share > 0.9:
            return None
        found = f"{len(right)} of {len(responses)} sampled responses think (8 are needed)"
        if len(right) >= 8:
            found = f"{share:.3f} of the {len(right)} sampled responses that think are right (not above 0.9)"
        return (
            f"--task chain: {found}: the policy has not passed SFT's phase transition, RL would be in vain; "
            "run python train_sft.py --task chain with more --steps"
        )


# ------------------------------------------------------------------------------------------------------------
# countdown: three numbers, one target


class Countdown(Task):
    """`3 7 2=13:` → `3*2+7`: reach the target with each number once, + - * and the usual precedence.

    Demonstrations are right about seven times in ten. The order of the numbers counts for `held_out`: those
    of a test prompt may occur in training in another order, with the same target.
    """

    name, tokenizer, alphabet, max_new_tokens = "countdown", "chars", "0123456789 +-*=:", 6

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

    def value(self, expression: str) -> int | None:
        """The value of `digit op digit op digit`, * before + and -; None for any other text. No eval."""
        if not re.fullmatch(r"[1-9][-+*][1-9][-+*][1-9]", expression):
            return None
        terms = re.findall(r"([-+]?)([1-9*]+)", expression)
        return sum((-1 if sign == "-" else 1) * math.prod(map(int, term.split("*"))) for sign, term in terms)

    def reward(self, prompt: str, response: str, row: dict | None = None) -> float:
        """1 if the response is one expression of exactly the prompt's numbers hitting the target, else 0."""
        match = re.fullmatch(r"([1-9]) ([1-9]) ([1-9])=([0-9]+):", prompt)
        if match is None:
            raise UserError(f"--task countdown: the prompt {prompt!r} is not of the form '3 7 2=13:'")
        *numbers, target = match.groups()
        return float(self.value(response) == int(target) and sorted(response[::2]) == sorted(numbers))


TASKS: dict[str, Task] = {task.name: task for task in (Reviews(), Chain(), Countdown())}


def get(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"--task {name}: no such task; choose one of {', '.join(TASKS)}")
    return TASKS[name]
