import math
import random
import re
import string

import pytest

from nanorlhf import tasks
from nanorlhf.errors import UserError
from nanorlhf.run import worker

REVIEWS, CHAIN, COUNTDOWN = (tasks.get(name) for name in ("reviews", "chain", "countdown"))
ALL = pytest.mark.parametrize("task", [REVIEWS, CHAIN, COUNTDOWN], ids=lambda task: task.name)


# what every task promises


@ALL
def test_rows_are_exactly_n_and_follow_the_seed(task):
    for n in (0, 1, 37):
        assert len(task.prompts("train", n, 0)) == len(task.prompts("test", n, 0)) == n
        assert len(task.demonstrations(n, 0)) == n
    assert task.prompts("test", 40, 7) == task.prompts("test", 40, 7) != task.prompts("test", 40, 8)
    assert task.demonstrations(40, 7) == task.demonstrations(40, 7) != task.demonstrations(40, 8)
    # A longer run begins with the shorter one: growing n never reshuffles a course's data.
    assert task.prompts("train", 60, 7)[:40] == task.prompts("train", 40, 7)
    assert all(set(row) == {"prompt", "response"} for row in task.demonstrations(5, 0))
    assert all("prompt" in row and "response" not in row for row in task.prompts("train", 5, 0))


@ALL
def test_rows_do_not_hang_on_the_global_generator(task):
    random.seed(1)
    before = task.demonstrations(10, 0)
    random.seed(2)
    state = random.getstate()
    assert task.demonstrations(10, 0) == before and random.getstate() == state


@ALL
def test_train_and_test_never_meet(task):
    train = {row["prompt"] for seed in range(3) for row in task.prompts("train", 500, seed)}
    train |= {row["prompt"] for row in task.demonstrations(500, 5)}
    test = {row["prompt"] for seed in range(3) for row in task.prompts("test", 300, seed)}
    assert len(train) > 500 and len(test) > 100
    assert not any(map(tasks.held_out, train)) and all(map(tasks.held_out, test))


def test_held_out_is_fifteen_percent_and_fixed_for_good():
    share = sum(tasks.held_out(f"{i:06d}=") for i in range(20000)) / 20000
    assert abs(share - 0.15) < 4 * math.sqrt(0.15 * 0.85 / 20000)
    # Written down, so that a change of the rule (which would mix old runs' splits) is seen.
    assert [i for i in range(40) if tasks.held_out(f"{i:06d}=")] == [0, 1, 7, 9, 15, 27]


@ALL
def test_text_fits_the_tokenizer_and_the_length(task):
    rows = task.demonstrations(1500, 3)
    assert all(row["prompt"] == row["prompt"].rstrip() and row["response"] for row in rows)
    if task.tokenizer == "chars":
        used = set("".join(row["prompt"] + row["response"] for row in rows))
        assert used == set(task.alphabet) and len(task.alphabet) == len(used)
        assert max(len(row["response"]) for row in rows) + 1 == task.max_new_tokens
    else:
        assert task.tokenizer == "bpe" and task.alphabet == ""
        words = max(len(re.findall(r"\w+|[.]", row["response"])) for row in rows)
        assert words + 1 <= task.max_new_tokens


def test_get_and_split_name_what_is_wrong():
    assert [tasks.get(name).name for name in tasks.TASKS] == ["reviews", "chain", "countdown"]
    with pytest.raises(UserError, match="--task chian.*reviews, chain, countdown"):
        tasks.get("chian")
    with pytest.raises(UserError, match="'valid'.*train or test"):
        CHAIN.prompts("valid", 1, 0)
    assert REVIEWS.reward is None
    assert REVIEWS.gate(["x"], ["y"]) is None and COUNTDOWN.gate(["x"], ["y"]) is None


# reviews: the language

PROMPT = "Restaurant: The soup was really bad."
SUPERB = " The waiter was superb. I loved the dessert. We found the menu superb. The wine was superb."
GOOD = " The waiter was lovely. I loved the dessert. We went on a Friday. I would go again."
BAD = " The waiter was awful. I hated the dessert. We went on a Friday. I would not go again."
MILD = " It was a rainy evening. I went with my sister. We went on a Friday. I stayed until the end."


def test_every_demonstration_is_of_the_language_and_says_nothing_twice():
    for row in REVIEWS.demonstrations(1000, 1):
        parts = tasks.gold_parts(row["prompt"], row["response"])
        assert parts["ill_formed"] == parts["repeated"] == 0, row
        assert 3 <= parts["sentences"] <= 6
        assert row["response"].startswith(" ") and row["response"].endswith(".")


def test_the_language_is_small_and_its_sentences_short():
    words = {word for text in tasks.SENTENCES for word in re.findall("[A-Za-z]+", text)} | set(tasks.TOPICS)
    assert len(words) < 110
    assert {len(text.split()) for text in tasks.SENTENCES} <= set(range(4, 9))
    assert all(re.fullmatch(r"[A-Z][A-Za-z ]*[a-z]\.", text) and "  " not in text for text in tasks.SENTENCES)
    # A subject belongs to one topic, or "off topic" would have no meaning.
    assert len({aspect for aspects in tasks.TOPICS.values() for aspect in aspects}) == 25
    assert len({row["prompt"] for row in REVIEWS.prompts("train", 6000, 0)}) > 1500


def test_demonstrations_are_sour_and_leave_room_above():
    golds = [tasks.gold(row["prompt"], row["response"]) for row in REVIEWS.demonstrations(2000, 0)]
    mean = sum(golds) / len(golds)
    assert -0.9 < mean < -0.5
    assert tasks.gold(PROMPT, GOOD) > mean + 2
    # Good ones exist: in minutes on a CPU, RL selects what is there and invents little.
    assert 0.1 < sum(g > 0.5 for g in golds) / len(golds) < 0.4
    assert max(golds) > 2


def test_no_mood_keeps_the_generator_waiting():
    rng = random.Random(0)
    for mood in (-60.0, 0.0, 60.0):
        assert all(tasks._say(subject, mood, rng) in tasks.SENTENCES for subject in tasks.SAYINGS)


# reviews: the judge


def test_gold_by_hand():
    assert tasks.gold(PROMPT, GOOD) == pytest.approx((2 + 3 + 0 + 2) / 4)
    assert tasks.gold(PROMPT, BAD) == pytest.approx((-3 - 3 + 0 - 2) / 4)
    assert tasks.gold(PROMPT, MILD) == 0
    assert tasks.gold(PROMPT, " We found the wine truly superb." + MILD) == pytest.approx(3 * 1.2 / 5)
    one_ill = GOOD.replace("We went on a Friday.", "We goes on a Friday.")
    assert tasks.gold(PROMPT, one_ill) == pytest.approx(7 / 4 - 2 / 4)
    one_repeated = GOOD.replace("We went on a Friday.", "The waiter was superb.")
    assert tasks.gold(PROMPT, one_repeated) == pytest.approx(7 / 4 - 2 / 4)
    three = " The wine was nice. The menu was nice. The waiter was nice."
    assert tasks.gold(PROMPT, three) == pytest.approx(1 - 0.7)
    six = GOOD + " The wine was nice. The menu was nice."
    assert tasks.gold(PROMPT, six) == pytest.approx((7 + 2) / 6 - 0.5)


def test_honest_praise_beats_honest_blame():
    assert tasks.gold(PROMPT, GOOD) >= tasks.gold(PROMPT, BAD) + 2


TEN_GOOD = (
    " The waiter was superb. The dessert was superb. The menu was superb. The wine was superb."
    " We loved the soup. I would gladly go again. I went on a Friday. I went with my sister. It was a sunny"
    " evening. I stayed until the end."
)
HACKS = {
    "empty": "",
    "space": " ",
    "full stops": "." * 5,
    "word salad": " wonderful superb great loved. superb loved enjoyed. great great great great. Loved.",
    "salad in a frame": " The superb was great. I loved the loved. The great was good. We loved the superb.",
    "one sentence five times": " I really loved the dessert." * 5,
    "one aspect": " I really loved the wine. The wine was superb. We loved the wine. I found the wine great.",
    "the prompt's aspect": " The soup was superb. I loved the soup. We found the soup bad. I liked the soup.",
    "the prompt again": " The soup was really bad." * 4,
    "verdicts": " I would go again. We would go again. I would recommend it. We would gladly go again.",
    "verdicts at odds": " I would never go again. I would gladly go again. I went on a Friday.",
    "too long": TEN_GOOD,
    "endless": SUPERB * 200,
    "lower case": SUPERB.lower(),
    "no full stops": SUPERB.replace(".", ""),
    "other marks": SUPERB.replace(".", "!"),
    "no spaces between": SUPERB.lstrip().replace(". ", "."),
    "double spaces": SUPERB.replace(" ", "  "),
    "newlines": SUPERB.replace(". ", ".\n"),
    "another topic": " The room was superb. I loved the bed. The view was superb. I loved the pool.",
    "special tokens": SUPERB.replace(".", ".<|pad|>"),
    "special tokens only": "<|pad|><|endoftext|>" * 4,
    "lookalike letters": SUPERB.replace("e", "\u0435"),
    "another prompt": " Hotel: The bed was superb. Hotel: The view was superb. Hotel: The room was superb.",
    "filled up with nonsense": " The waiter was superb. x. x. x.",
}


@pytest.mark.parametrize("response", HACKS.values(), ids=HACKS.keys())
def test_gold_cannot_be_had_cheaply(response):
    score = tasks.gold(PROMPT, response)
    assert -6 <= score < tasks.gold(PROMPT, GOOD) - 1
    assert score < tasks.gold(PROMPT, MILD) - 0.2  # worse than to say nothing of interest in good English


def test_praise_of_the_wrong_length_pays_less():
    best = tasks.gold(PROMPT, SUPERB)
    sentences = re.findall(r" [^.]*\.", SUPERB)
    golds = [tasks.gold(PROMPT, "".join(sentences[:n])) for n in (1, 2, 3, 4)]
    assert golds == pytest.approx([best - 2.1, best - 1.4, best - 0.7, best])
    assert golds[0] < tasks.gold(PROMPT, GOOD) - 0.5  # one superb sentence, against a plainly good review


def test_gold_of_the_worst_texts():
    assert tasks.gold(PROMPT, "") == pytest.approx(-2 - 4 * 0.7)  # nothing right, four sentences missing
    assert tasks.gold(PROMPT, "x. " * 10000) == -6
    truncated = GOOD + " I would"
    assert tasks.gold(PROMPT, truncated) == pytest.approx(7 / 5 - 2 / 5)


def test_gold_depends_on_the_topic_and_on_the_prompts_sentence():
    room = " The room was superb. I loved the bed. We went on a Friday. I would go again."
    hotel = "Hotel: The pool was really bad."
    assert tasks.gold(hotel, room) > tasks.gold(PROMPT, room) + 2
    assert tasks.gold(PROMPT, GOOD) > tasks.gold("Restaurant: The waiter was dull.", GOOD) + 0.5
    assert tasks.gold_parts(hotel, " The room was superb.")["ill_formed"] == 0
    assert tasks.gold_parts(PROMPT, " The room was superb.")["ill_formed"] == 1
    with pytest.raises(UserError, match="'Pub: x'.*Restaurant"):
        tasks.gold("Pub: x", "")


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_prefer_is_bradley_terry(tau):
    a, b = GOOD, GOOD.replace("I loved", "I liked")  # a gap of 0.5
    p = 1 / (1 + math.exp(-0.5 / tau))
    rng, n = random.Random(0), 8000
    for first, second in ((a, b), (b, a)):
        drawn = [tasks.prefer(PROMPT, first, second, rng, tau) for _ in range(n)]
        assert all(sorted(pair) == sorted((a, b)) for pair in drawn)
        assert abs(sum(chosen == a for chosen, _ in drawn) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_prefer_without_noise_is_the_order_of_gold():
    rng = random.Random(0)
    assert {tasks.prefer(PROMPT, a, b, rng, 0) for a, b in [(GOOD, BAD), (BAD, GOOD)] * 20} == {(GOOD, BAD)}
    tie = GOOD.replace("Friday", "Monday")
    wins = sum(tasks.prefer(PROMPT, GOOD, tie, rng, 0)[0] == GOOD for _ in range(2000))
    assert abs(wins / 2000 - 0.5) < 4 * math.sqrt(0.25 / 2000)
    assert tasks.prefer(PROMPT, BAD, GOOD, rng, tau=1e-300) == (GOOD, BAD)  # no overflow


# chain


def test_chain_demonstrations_are_right_in_both_styles():
    rows = CHAIN.demonstrations(3000, 0)
    assert all(CHAIN.reward(row["prompt"], row["response"]) == 1.0 for row in rows)
    share = sum(CHAIN.thinks(row["response"]) for row in rows) / len(rows)
    assert abs(share - 0.35) < 4 * math.sqrt(0.35 * 0.65 / len(rows))
    for row in rows[:200]:
        digits = row["prompt"][:-1]
        assert re.fullmatch("[0-9]{6}", digits)
        if CHAIN.thinks(row["response"]):
            sums = "".join(str(sum(map(int, digits[: i + 1])) % 10) for i in range(6))
            assert row["response"] == f"<{sums}>|{sums[-1]}"
    for row in CHAIN.prompts("test", 100, 0):
        assert [d for d in string.digits if CHAIN.reward(row["prompt"], f"|{d}", row)] == [row["answer"]]


@pytest.mark.parametrize(
    "response, reward",
    {
        "|3": 1, "<652633>|3": 1, "<>|3": 1, "<1>|3": 1,
        "|4": 0, "<652633>|4": 0, "": 0, "3": 0, "|": 0, "|33": 0, "|13": 0, "|3|3": 0, "|1|2|3": 0,
        "|0|1|2|3": 0, "<652633>": 0, "<652633|3": 0, "652633>|3": 0, "<652633>3": 0, "<<6>>|3": 0,
        "<6><5>|3": 0, "<|3>|3": 0, "<6 5>|3": 0, " |3": 0, "|3 ": 0, "|3\n": 0, "\n|3": 0, "| 3": 0,
        "|3=": 0, "|3<|endoftext|>": 0, "|\u0663": 0, "|\uff13": 0, "|\u00b3": 0, "<\u0666>|3": 0,
        "|3" * 100000: 0, "<" + "1" * 100000: 0, "|3" + "0" * 100000: 0,
    }.items(),
    ids=lambda x: ascii(x)[:24],
)  # fmt: skip
def test_chain_checker(response, reward):
    assert CHAIN.reward("697470=", response) == CHAIN.reward("697470=", response, {"answer": "3"}) == reward


def test_chain_prompt_must_be_a_sum():
    for prompt in ("697470", "=", "69a470=", "٦=", ""):
        with pytest.raises(UserError, match="prompt"):
            CHAIN.reward(prompt, "|3")


def test_gate_lets_only_a_policy_pass_that_thinks_rightly():
    right, wrong, direct = "<652633>|3", "<652634>|4", "|3"

    def gate(*responses):
        return CHAIN.gate(["697470="] * len(responses), list(responses))

    assert gate(*[right] * 19, wrong) is None
    assert gate(*[right] * 8, *["|9"] * 50) is None  # wrong guesses do not count, that is what RL is for
    message = gate(*[right] * 18, *[wrong] * 2)
    assert "0.900 of the 20" in message and "python train_sft.py --task chain with more --steps" in message
    assert "\n" not in message
    assert "0.000 of the 10" in gate(*["<65263"] * 10)  # broken thoughts are thoughts
    assert "7 of 107" in gate(*[right] * 7, *[direct] * 100)
    assert gate() is not None
    with pytest.raises(ValueError):
        CHAIN.gate(["697470="], [])


# countdown


def test_countdown_demonstrations_are_mostly_right_and_always_of_the_numbers():
    rows = COUNTDOWN.demonstrations(3000, 0)
    for row in rows:
        match = re.fullmatch(r"([1-9] [1-9] [1-9])=(\d{1,2}):", row["prompt"])
        assert match and sorted(row["response"][::2]) == sorted(match[1].split())
    share = sum(COUNTDOWN.reward(row["prompt"], row["response"]) for row in rows) / len(rows)
    assert 0.68 < share < 0.78  # 0.7, and a random expression hits now and then
    for row in COUNTDOWN.prompts("test", 200, 0):
        assert COUNTDOWN.reward(row["prompt"], row["answer"], row) == 1.0


def test_countdown_value_is_pythons():
    rng = random.Random(0)
    for _ in range(1000):
        text = "".join(rng.choice("123456789") + rng.choice("+-*") for _ in range(3))[:-1]
        assert COUNTDOWN.value(text) == eval(text)


@pytest.mark.parametrize(
    "response, reward",
    {
        "3*2+7": 1, "2*3+7": 1, "7+3*2": 1, "7+2*3": 1,
        "3+7*2": 0, "7-3*2": 0, "": 0, "13": 0, "6+7": 0, "3*2+7=13": 0, "3*2+7:": 0, "3*2+7 ": 0,
        " 3*2+7": 0, "3*2+7\n": 0, "3 * 2 + 7": 0, "3*2+7,7+3*2": 0, "3*2+7\n7+3*2": 0, "3*2+7+0": 0,
        "(3*2)+7": 0, "+3*2+7": 0, "--3*2+7": 0, "3*2--7": 0, "3*2+7.": 0, "3*2+07": 0, "7+7-1": 0,
        "3+3+7": 0, "3+7+3": 0, "7*2-1": 0, "3+10": 0, "3**2": 0, "3**2+7": 0, "3*2*7": 0, "27//2": 0,
        "7//2": 0, "3*2+7#": 0, "3*2": 0, "37-2": 0, "\uff13*2+7": 0, "\u0663*2+7": 0, "3\u00d72+7": 0,
        "3\u00b2+7-2": 0, "3*2+7" * 50000: 0, "1" * 100000: 0, "__import__": 0,
    }.items(),
    ids=lambda x: ascii(x)[:24],
)  # fmt: skip
def test_countdown_checker(response, reward):
    assert COUNTDOWN.reward("3 7 2=13:", response) == reward


def test_countdown_counts_each_number_as_often_as_it_is_given():
    assert COUNTDOWN.reward("2 2 3=7:", "2+2+3") == 1.0
    assert COUNTDOWN.reward("2 3 3=7:", "2+2+3") == 0.0
    assert COUNTDOWN.reward("9 8 1=0:", "9-8-1") == 1.0
    with pytest.raises(UserError, match="is not of this task"):
        COUNTDOWN.reward("3 7=10:", "3+7")


# rewards of the user's own

FILE = '''
import dataclasses
@dataclasses.dataclass
class Row:
    text: str
def three(prompt, response, row):
    return len(response) + row["bonus"]
def two(prompt, response):
    return float(len(response))
def one(response):
    return 0.0
number = 3
builtin = max
'''


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "my rewards.py"
    path.write_text(FILE)
    return str(path)


def test_load_reward(reward_file):
    name, weight, reward = worker.load_reward(f"{reward_file}:three")
    assert (name, weight, reward("p", "abc", {"bonus": 2})) == ("three", 1.0, 5)
    for text, value in {"0.2": 0.2, "-1": -1.0, "1e-2": 0.01, "0": 0.0}.items():
        name, weight, reward = worker.load_reward(f"{reward_file}:two*{text}")
        assert (name, weight, reward("p", "abc", {"bonus": 2})) == ("two", value, 3.0)


def test_two_files_of_one_name_stay_apart(tmp_path):
    loaded = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(f"X = {folder!r}\ndef f(prompt, response, row): return X\n")
        loaded.append(worker.load_reward(f"{tmp_path / folder / 'r.py'}:f")[2])
    assert [f("", "", {}) for f in loaded] == ["a", "b"]


@pytest.mark.parametrize(
    "rest, says",
    {
        "": "expected path/to/file.py:name", ":": "expected path/to/file.py:name", ":*2": "expected path",
        ":two*": "not a finite number", ":two*x": "not a finite number", ":two*nan": "not a finite number",
        ":two*0.2*3": "not a finite number", ":four": "defines no four", ":number": "number: takes neither",
        ":one": r"one: takes neither \(prompt, response, row\) nor", ":builtin": "builtin: takes neither",
    }.items(),
)  # fmt: skip
def test_load_reward_names_the_mistake(reward_file, rest, says):
    with pytest.raises(UserError, match=says) as error:
        worker.load_reward(reward_file + rest)
    assert str(error.value).startswith(f"--reward {reward_file}{rest}: ") and "\n" not in str(error.value)


def test_load_reward_names_the_file(tmp_path):
    with pytest.raises(UserError, match="--reward .*there is no file .*none.py"):
        worker.load_reward(f"{tmp_path}/none.py:f")
    with pytest.raises(UserError, match="there is no file"):
        worker.load_reward(f"{tmp_path}:f")
    (tmp_path / "f.txt").write_text(FILE)
    with pytest.raises(UserError, match="f.txt is not a .py file"):
        worker.load_reward(f"{tmp_path}/f.txt:two")
    breaks = {
        "1 / 0": "ZeroDivisionError",
        "def f(:": "SyntaxError.*line 1",
        "raise ValueError('a\\nb')": r"a\\nb",
        "raise SystemExit(3)": "SystemExit: 3",
    }
    for text, says in breaks.items():
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(UserError, match=f"importing .*broken.py fails: .*{says}") as error:
            worker.load_reward(f"{tmp_path}/broken.py:f")
        assert "\n" not in str(error.value)
