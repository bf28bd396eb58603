import torch

from course.checking import call, demand, expect, gradient, random, tensor

POINTS = {"group_advantages": 3, "token_weights": 3, "clipped_loss": 4, "sequence_ratio": 2}
AGGREGATIONS = ("token", "seq_mean", "seq_sum_const")


def check_group_advantages(group_advantages):
    reward = tensor([1.0, 0.0, 0.0, 1.0])
    group = torch.tensor([0, 0, 0, 0])
    got = call(group_advantages, reward, group)
    root = 3**0.5 / 2
    expect(got, root * tensor([1, -1, -1, 1]), "group_advantages([1, 0, 0, 1]) of one prompt", {
        "your advantage has the sign of mean − reward: good responses would become rare":
            root * tensor([-1, 1, 1, -1]),
        "your standard deviation divides by G, and it should divide by G − 1 (torch.std does)":
            tensor([1, -1, -1, 1]),
        "you divide by the variance, and not by its square root": 1.5 * tensor([1, -1, -1, 1]),
        "the standard deviation is missing: this is Dr. GRPO's advantage": tensor([0.5, -0.5, -0.5, 0.5]),
    })  # fmt: skip
    reward = tensor([1.0, 10.0, 0.0, 30.0, 1.0, 20.0])
    group = torch.tensor([0, 1, 0, 1, 0, 1])
    want = tensor([0.57735, -1, -1.154701, 1, 0.57735, 0])
    whole = (reward - reward.mean()) / reward.std()
    mixed = reward - tensor([2 / 3, 20, 2 / 3, 20, 2 / 3, 20])
    halves = torch.cat([(part - part.mean()) / part.std() for part in reward.view(2, 3)])
    where = "group_advantages([1, 10, 0, 30, 1, 20], groups [0, 1, 0, 1, 0, 1])"
    expect(call(group_advantages, reward, group), want, where, {
        "mean and standard deviation are those of the whole batch: each prompt has its own": whole,
        "the standard deviation is that of the whole batch, the mean that of the prompt":
            mixed / reward.std(),
        "you take neighbours for a group: `group` says which rows belong together": halves,
    })  # fmt: skip
    dead = call(group_advantages, torch.full((3,), 0.1), torch.tensor([0, 0, 0]))
    demand(
        isinstance(dead, torch.Tensor) and dead.isfinite().all(),
        "a group whose rewards are all equal gives nan: 0/0. Where is eps?",
    )
    demand(
        not dead.any(),
        "a group whose rewards are all equal does not give exactly 0: the mean of three times 0.1 is not "
        "0.1 in fp32, and the rounding is divided by eps. Set such a group to 0",
    )


def check_token_weights(token_weights):
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    want = {
        "token": tensor([[0, 1, 1, 1], [0, 1, 0, 0]]) / 4,
        "seq_mean": tensor([[0, 1, 1, 1], [0, 3, 0, 0]]) / 6,
        "seq_sum_const": tensor([[0, 1, 1, 1], [0, 1, 0, 0]]) / 10,
    }
    every = torch.ones(2, 4, dtype=torch.float64)
    longest = tensor(mask.tolist()) / 6
    for agg in AGGREGATIONS:
        got = call(token_weights, mask, agg, 5)
        rows = 1 if agg == "token" else 2
        where = f'token_weights of responses with 3 and 1 tokens, "{agg}", longest 5'
        mistakes = {
            "the responses are summed, and not averaged: divide by their number too": want[agg] * rows,
            "you divide by the padded width T, and not by what is counted": tensor(mask.tolist()) / 8,
            "tokens outside the mask have a weight": every * want[agg][0, 1],
            'you divide by the longest response of this batch: "seq_sum_const" takes the constant': longest,
        }
        if agg != "seq_mean":
            mistakes["this is the weight of seq_mean"] = want["seq_mean"]
        if agg != "token":
            mistakes["this is the weight of token: a mean over all tokens"] = want["token"]
        expect(got, want[agg], where, mistakes)


def check_clipped_loss(clipped_loss):
    one = torch.ones(1, 1, dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    old = tensor([[-1.0]])

    def at(ratio, adv, low=0.2, high=0.3):
        logp = old + tensor([[ratio]]).log()
        return call(clipped_loss, logp, old, tensor([adv]), mask, one, low, high)

    def where(ratio, adv):
        return f"one token with ratio {ratio} and advantage {adv}, clip_low 0.2, clip_high 0.3"

    expect(at(1.1, 1.0), -1.1, where(1.1, 1), {
        "your loss has the wrong sign: −A ρ is to be made small": 1.1,
        "your ratio is upside down: it is exp(logp − old_logp), new over old": -1 / 1.1,
        "the ratio is missing its exp": -tensor(1.1).log(),
    })  # fmt: skip
    expect(at(1.5, 1.0), -1.3, where(1.5, 1), {
        "nothing is clipped here: beyond 1 + clip_high the loss must not fall any further (or you take the "
        "smaller of the two losses: the larger counts)": -1.5,
        "you clip at 1 + clip_low: clip_high is the upper side": -1.2,
    })  # fmt: skip
    expect(at(0.5, -1.0), 0.8, where(0.5, -1), {
        "nothing is clipped on the lower side": 0.5,
        "you clip at 1 − clip_high: clip_low is the lower side": 0.7,
    })  # fmt: skip
    expect(at(0.5, 1.0), -0.5, where(0.5, 1), {
        "you take the clipped loss alone: a good token that became rare must keep its gradient, and the "
        "larger of both losses does that": -0.8,
    })  # fmt: skip
    expect(at(1.5, -1.0), 1.5, where(1.5, -1), {
        "you take the clipped loss alone: a bad token that became likely must keep its gradient": 1.3,
    })  # fmt: skip
    logp = random(3, 4)
    old = random(3, 4, seed=1)
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    w = random(3, 4, seed=2).abs()
    adv = tensor([1.0, -2.0, 0.5])
    total = 0.0
    for b, t in mask.nonzero().tolist():
        ratio = (logp[b, t] - old[b, t]).exp().item()
        bounded = min(max(ratio, 0.8), 1.2)
        total += w[b, t].item() * max(-adv[b].item() * ratio, -adv[b].item() * bounded)
    arguments = (old, adv, mask, w, 0.2, 0.2)
    everything = call(clipped_loss, logp, old, adv, torch.ones_like(mask), w, 0.2, 0.2)
    expect(call(clipped_loss, logp, *arguments), total, "three rows with a mask and weights", {
        "the mask is forgotten: tokens outside of it count": everything.detach(),
        "the weights w are forgotten":
            call(clipped_loss, logp, old, adv, mask, torch.ones_like(w), 0.2, 0.2).detach(),
        "you divide once more: the weights w hold the division already": total / mask.sum().item(),
    })  # fmt: skip
    grad = gradient(clipped_loss, old.clone(), *arguments)
    want = torch.where(mask, -adv[:, None] * w, 0.0)
    expect(grad, want, "the gradient where policy and old policy are the same (all ratios are 1)")
    huge = torch.where(mask, logp, 1000.0)
    demand(
        gradient(clipped_loss, huge, *arguments).isfinite().all(),
        "a log-prob of 1000 outside the mask makes the gradient nan: exp(1000) is inf, and 0 · inf is "
        "nan. Set the log-ratio to 0 outside the mask before exp",
    )


def check_sequence_ratio(sequence_ratio):
    logp = tensor([[9.0, 0.2, 0.4, 0.0], [9.0, 0.3, 0.0, 9.0]])
    old = tensor([[0.0, 0.0, 0.0, -0.3], [0.0, 0.1, 0.0, 0.0]])
    mask = torch.tensor([[False, True, True, True], [False, True, True, False]])
    log_ratio = torch.where(mask, logp - old, 0.0)
    want = tensor([0.3, 0.1]).exp()
    got = call(sequence_ratio, logp, old, mask)
    expect(got, want, "sequence_ratio of log-ratios (0.2, 0.4, 0.3) and (0.2, 0)", {
        "your ratio is upside down: it is new over old": 1 / want,
        "you have the ratio of the whole response, the product of all ratios: GSPO takes the geometric mean, "
        "so that long responses are not clipped more": log_ratio.sum(1).exp(),
        "you take the arithmetic mean of the ratios: the mean stands inside the exp":
            (log_ratio.exp() * mask).sum(1) / mask.sum(1),
        "you divide by the padded width T and not by the response's own tokens": (log_ratio.sum(1) / 4).exp(),
        "the mask is forgotten": (logp - old).mean(1).exp(),
    })  # fmt: skip
