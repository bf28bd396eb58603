import torch

from course.checking import call, demand, expect, gradient, tensor

POINTS = {"shape_rewards": 3, "gae": 4, "whiten": 2, "value_loss": 3}


def check_shape_rewards(shape_rewards):
    logp = tensor([[-5, -1, -0.5, -2, -7], [-5, -1, -1, -7, -7]])
    ref_logp = tensor([[-3, -2, -0.5, -1, -9], [-3, -0.5, -2, -9, -9]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    finished = torch.tensor([True, False])
    score = tensor([3.0, 4.0])
    got = call(shape_rewards, score, logp, ref_logp, mask, finished, 0.5, -1.0)
    penalty = tensor([[0, -0.5, 0, 0.5, 0], [0, 0.25, -0.5, 0, 0]])
    end = tensor([[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    before_end = tensor([[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
    last_column = tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]])
    scores = tensor([[3.0], [-1.0]])
    unmasked = -0.5 * (logp - ref_logp)
    expect(got, penalty + end * scores, "shape_rewards, scores 3 and 4, the second unfinished, beta 0.5", {
        "your KL penalty has the wrong sign: a token that the policy likes more than the reference does must "
        "cost, or the policy is paid for running away": -penalty + end * scores,
        "the score of the unfinished response is its own: it must be replaced by no_eos_score":
            penalty + end * score[:, None],
        "no_eos_score is added to the score, and it should replace it":
            penalty + end * tensor([[3.0], [3.0]]),
        "finished and unfinished are swapped": penalty + end * tensor([[-1.0], [4.0]]),
        "the score stands at the last column, which is padding in "
        "a short row: the mask says where a row ends":
            penalty + last_column * scores,
        "the score stands one token before the end": penalty + before_end * scores,
        "every token gets the score: only the last one does": penalty + mask * scores,
        "the mask is forgotten: prompt and padding are charged for their KL": unmasked + end * scores,
        "beta is forgotten": 2 * penalty + end * scores,
        "the KL penalty is missing": end * scores,
    })  # fmt: skip


def by_double_sum(reward, value, mask, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k}, row by row: the definition, and no recursion."""
    adv = torch.zeros_like(reward)
    for b in range(len(reward)):
        inside = mask[b].nonzero()[:, 0].tolist()
        for i, t in enumerate(inside):
            for k, s in enumerate(inside[i:]):
                behind = value[b, s + 1] if s != inside[-1] else 0.0
                adv[b, t] += (gamma * lam) ** k * (reward[b, s] + gamma * behind - value[b, s])
    return adv


def check_gae(gae):
    reward = tensor([[9.0, -0.05, 0.0, 0.98, 9.0], [9.0, 0.1, 1.0, 9.0, 9.0]])
    value = tensor([[9.0, 0.5, 0.5, 0.8, 9.0], [9.0, 0.3, 0.6, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    result = call(gae, reward, value, mask, 0.9, 0.8)
    demand(isinstance(result, tuple) and len(result) == 2, "return two tensors: advantages and returns")
    adv, ret = result
    want = by_double_sum(reward, value, mask, 0.9, 0.8)
    runs_on = torch.zeros_like(reward)  # the value and the advantage of what is behind the end
    late = torch.zeros_like(reward)
    following = 0.0
    for t in reversed(range(5)):
        behind = value[:, t + 1] if t < 4 else 0.0
        following = reward[:, t] + 0.9 * behind - value[:, t] + 0.72 * following
        runs_on[:, t] = following
    inside = torch.where(mask, value, 0.0)
    for t in range(1, 4):
        late[:, t] = reward[:, t] + 0.9 * inside[:, t] - inside[:, t]
    one_step = by_double_sum(reward, value, mask, 0.9, 0.0)
    where = "the advantages for gamma 0.9, lam 0.8"
    expect(adv, want, where, {
        "your advantage has the wrong sign": -want,
        "the end of a row is not seen: value and advantage of the padding run into the last token, and both "
        "are 0 behind it": torch.where(mask, runs_on, 0.0),
        "the mask is forgotten: the results are not 0 outside of it": runs_on,
        "gamma is forgotten": by_double_sum(reward, value, mask, 1.0, 0.8),
        "the sum is discounted by gamma alone, and it should be gamma · lam":
            by_double_sum(reward, value, mask, 0.9, 1.0),
        "these are the one-step advantages δ: lam · gamma · the next advantage is missing": one_step,
        "the sum is discounted by lam alone, and it should be gamma · lam":
            by_double_sum(reward, value, mask, 0.9, 0.8 / 0.9),
        "δ takes the value of the token itself in place of the next one's": late,
        "these are returns: the value is not subtracted": want + inside,
    })  # fmt: skip
    expect(ret, torch.where(mask, want + value, 0.0), "the returns for gamma 0.9, lam 0.8", {
        "the return is the advantage plus the value, and yours is the advantage alone": want,
        "the return is the advantage *plus* the value": want - inside,
        "the returns are not 0 outside the mask": want + value,
        "these are sums of rewards: the critic learns advantage + value (with lam 1 the two are the same)":
            by_double_sum(reward, 0 * value, mask, 0.9, 1.0),
    })  # fmt: skip
    whole = call(gae, reward, value, mask, 1.0, 1.0)[1]
    to_go = torch.where(mask, torch.where(mask, reward, 0.0).flip(1).cumsum(1).flip(1), 0.0)
    expect(
        whole, to_go, "the returns for gamma 1, lam 1, which are the rewards to go, whatever the critic says"
    )


def check_whiten(whiten):
    x = tensor([[9.0, 1.0, 4.0, 9.0], [9.0, 1.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]).bool()
    got = call(whiten, x, mask)
    centred = tensor([[0, -1, 2, 0], [0, -1, 0, 0]])
    everything = (x - x.mean()) / x.std(correction=0)
    expect(got, centred / 2**0.5, "whiten([[1, 4], [1]])", {
        "your variance divides by n − 1, and it should divide by n": centred / 3**0.5,
        "you divide by the variance, and not by its square root": centred / 2,
        "the result is centred and not divided by the standard deviation": centred,
        "outside the mask the result must be 0": (x - 2) / 2**0.5,
        "mean and variance are those of all positions: only those of the mask count":
            torch.where(mask, everything, 0.0),
        "the mask is forgotten: prompt and padding are in mean and variance": everything,
        "the mean is not subtracted": torch.where(mask, x, 0.0) / 2**0.5,
        "you whiten each row by itself: it is one mean and one variance for the whole rollout":
            tensor([[0, -1, 1, 0], [0, 0, 0, 0]]),
    })  # fmt: skip
    got = call(whiten, tensor([[0.0, 4.0, 4.0, 0.0]]), torch.tensor([[False, True, True, False]]))
    demand(got.isfinite().all(), "where all advantages are equal the result is nan: 0/0. Where is the 1e-8?")


def check_value_loss(value_loss):
    value = tensor([[9.0, 1.0, 0.0, 0.5]])
    old = tensor([[0.0, 0.0, 0.1, 2.0]])
    ret = tensor([[0.0, 1.0, 1.0, 2.0]])
    mask = torch.tensor([[False, True, True, True]])
    free = (value - ret).square()
    held = (old + (value - old).clamp(-0.2, 0.2) - ret).square()
    larger = torch.maximum(free, held)

    def mean(errors):
        return torch.where(mask, errors, 0.0).sum() / 3

    got = call(value_loss, value, old, ret, mask, 0.2, 3)
    expect(got, mean(larger) / 2, "value_loss of three tokens, denom 3", {
        "the factor ½ is missing": mean(larger),
        "nothing is clipped: this is the plain squared error (or you clip around the return, which never "
        "makes an error larger: the clip is around old_value)": mean(free) / 2,
        "you take the clipped error alone: the larger of both counts": mean(held) / 2,
        "you take the smaller error: the larger one counts, or the clip would reward moving far":
            mean(torch.minimum(free, held)) / 2,
        "the mask is forgotten: the prompt has an error too": larger.sum() / 6,
        "you do not divide by denom": mean(larger) * 1.5,
        "the errors are not squared": mean(larger.sqrt()) / 2,
    })  # fmt: skip
    got = call(value_loss, value, old, ret, mask, 0.2, 6)
    expect(got, mean(larger) / 4, "value_loss of three tokens, denom 6", {
        "you take the mean over the mask: it is denom, the tokens of the whole step": mean(larger) / 2,
    })  # fmt: skip
    grad = gradient(value_loss, value, old, ret, mask, 10.0, 1)
    want = torch.where(mask, value - ret, 0.0)
    expect(grad, want, "∂loss/∂value with a clip so wide that it does nothing: value − ret")
