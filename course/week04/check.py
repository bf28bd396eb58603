import torch

from course.checking import call, demand, expect, gradient, random, tensor

POINTS = {"bandit_gradient": 3, "reinforce_loss": 3, "rewards_to_go": 2, "leave_one_out": 2}


def check_bandit_gradient(bandit_gradient):
    logits = tensor([0.0, 0.0])
    got = call(bandit_gradient, logits, tensor([1.0, 0.0]))
    expect(got, tensor([0.25, -0.25]), "bandit_gradient([0, 0], [1, 0])", {
        "your gradient has the sign of a descent: ascending it would lower the reward":
            tensor([-0.25, 0.25]),
        "you have π(a)·r(a): the average reward is not subtracted. More probability for one action takes it "
        "from the others, and that is what the average stands for": tensor([0.5, 0.0]),
        "you have π(a)(1 − π(a))·r(a), which is only the effect of a logit on its own probability: it "
        "changes the other probabilities too": tensor([0.25, 0.0]),
        "you have r(a) − average without the factor π(a)": tensor([0.5, -0.5]),
    })  # fmt: skip
    logits = tensor([1.0, -0.5, 0.3, 2.0])
    reward = tensor([2.0, -1.0, 5.0, 0.5])
    got = call(bandit_gradient, logits, reward)
    h = 1e-5
    slopes = []  # by finite differences of the expected reward
    for k in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[k] = h
        up = ((logits + step).softmax(0) * reward).sum()
        down = ((logits - step).softmax(0) * reward).sum()
        slopes.append((up - down) / (2 * h))
    p = logits.softmax(0)
    expect(got, torch.stack(slopes), "bandit_gradient([1, -0.5, 0.3, 2], [2, -1, 5, 0.5])", {
        "the average must be taken under π, and yours is the plain mean of the rewards":
            p * (reward - reward.mean()),
    })  # fmt: skip


def check_reinforce_loss(reinforce_loss):
    logp = tensor([[-9.0, -1.0, -2.0], [-8.0, -3.0, -9.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    adv = tensor([2.0, -1.0])
    got = call(reinforce_loss, logp, adv, mask, 3)
    expect(got, (2 * 3 - 3) / 3, "reinforce_loss with advantages (2, -1) and denom 3", {
        "your loss has the wrong sign: an optimizer lowers the loss, so that it would make good responses "
        "rare": -1.0,
        "the mask is forgotten: the prompt and the padding are in your sum": (2 * 12 - 20) / 3,
        "the advantage is forgotten: this is the loss of SFT": 2.0,
        "you take the mean over each response first, and then the sum: every token should count the same":
            (2 * 1.5 - 3) / 3,
        "you do not divide by denom: the sum must be divided by it": 3.0,
    })  # fmt: skip
    got = call(reinforce_loss, logp, adv, mask, 6)
    expect(got, 0.5, "reinforce_loss with advantages (2, -1) and denom 6", {
        "you divide by the tokens of the mask (a mean) and not by denom, which may count the tokens of a "
        "larger step": 1.0,
    })  # fmt: skip
    grad = gradient(reinforce_loss, logp, adv, mask, 3)
    expect(grad, tensor([[0.0, -2 / 3, -2 / 3], [0.0, 1 / 3, 0.0]]), "∂loss/∂logp")
    parameter = adv.clone().requires_grad_()
    loss = reinforce_loss(logp.clone().requires_grad_(), parameter, mask, 3)
    into_adv = torch.autograd.grad(loss, parameter, allow_unused=True)[0]
    demand(
        into_adv is None or not into_adv.any(),
        "a gradient flows into the advantage: with a learnt baseline the loss would train the baseline to "
        "make the loss small. The advantage is a constant: adv.detach()",
    )
    padded = torch.where(mask, logp, -torch.inf)
    got = call(reinforce_loss, padded, adv, mask, 3)
    demand(
        torch.as_tensor(got).isfinite().all(),
        "where a log-prob outside the mask is -inf, your loss is nan: 0 · inf is nan. Take "
        "torch.where(mask, ..., 0.0), which drops what is outside, in place of a product with the mask",
    )


def check_rewards_to_go(rewards_to_go):
    reward = tensor([[7.0, 1.0, 0.0, 2.0], [7.0, 1.0, 4.0, 9.0]])
    mask = torch.tensor([[False, True, True, True], [False, True, True, False]])
    got = call(rewards_to_go, reward, mask)
    want = tensor([[0, 3, 2, 2], [0, 5, 4, 0]])
    inside = torch.where(mask, reward, 0.0)
    strict = tensor([[0, 2, 2, 0], [0, 4, 0, 0]])
    raw = torch.where(mask, reward.flip(1).cumsum(1).flip(1), 0.0)
    expect(got, want, "rewards_to_go([[7, 1, 0, 2], [7, 1, 4, 9]]), where the 7s and the 9 are masked", {
        "you sum from the left: this is the reward up to a token, which the token cannot change any more":
            torch.where(mask, inside.cumsum(1), 0.0),
        "you start one token late: the token's own reward belongs to its sum": strict,
        "the mask is forgotten: rewards outside the mask are garbage, and are in your sums": raw,
        "every token gets the whole reward of its response: correct in the mean, but not the sum from this "
        "token on": torch.where(mask, inside.sum(1, keepdim=True), 0.0),
        "outside the mask the result must be 0": inside.flip(1).cumsum(1).flip(1),
    })  # fmt: skip


def check_leave_one_out(leave_one_out):
    reward = tensor([[1.0, 0.0, 0.0]])
    own = reward - reward.mean(1, keepdim=True)
    expect(call(leave_one_out, reward), tensor([[1.0, -0.5, -0.5]]), "leave_one_out([[1, 0, 0]])", {
        "your advantage has the wrong sign: the baseline minus the reward": tensor([[-1.0, 0.5, 0.5]]),
        "your baseline has the sample's own reward in it: it is the mean of all, and not of the others": own,
        "you sum the other rewards in place of taking their mean": tensor([[1.0, -1.0, -1.0]]),
        "you divide the others' sum by G, and there are G − 1 of them": tensor([[1.0, -1 / 3, -1 / 3]]),
    })  # fmt: skip
    reward = random(3, 4) + tensor([[0.0], [10.0], [-5.0]])
    want = (reward - reward.mean(1, keepdim=True)) * 4 / 3
    expect(call(leave_one_out, reward), want, "leave_one_out of 3 prompts with 4 samples each", {
        "the mean is that of all prompts together: each prompt has a baseline of its own":
            reward - (reward.sum() - reward) / 11,
        "the mean runs over the prompts, dimension 0, and not over the samples of one prompt":
            reward - (reward.sum(0, keepdim=True) - reward) / 2,
    })  # fmt: skip
