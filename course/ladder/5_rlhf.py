"""5 · RLHF: the reward is not given but learnt from pairs, and a KL penalty holds the policy near its start.

REWARD only decides pairs now: y wins against z with probability σ(REWARD y − REWARD z). A reward model learns
from them, and PPO climbs its score − BETA log π/π_ref. The best policy for that is known, up to a factor:
π_ref exp(REWARD / BETA). With seed 0 it has 5.04 points, and this program and the next end at 5.03.
"""

import torch
from torch.nn.functional import logsigmoid
from torch.optim import Adam

BETA = 1.0
text = torch.arange(64)  # 16 p + 4 a + b
p = text // 16
a = text // 4 % 4
b = text % 4
ROW = torch.stack([p, 4 + text // 4], 1)  # (64, 2)
DIGIT = torch.stack([a, b], 1)  # (64, 2)
REWARD = 6.0 - (a + b - p).abs()  # (64,)


def log_probs(logits):  # (20, 4) → log π of both digits of every text (64, 2)
    logp = logits.log_softmax(1)
    return logp[ROW, DIGIT]


def sample(logp, n=8):  # (64, 2) → n texts of each prompt (4, n)
    probs = logp.sum(1).exp()  # digit after digit, as a language model draws, gives the same
    answer = probs.view(4, 16).multinomial(n, True)  # True: with replacement
    return text.view(4, 16).gather(1, answer)


def pairwise_loss(chosen, rejected):  # scores of the winners, of the others
    return -logsigmoid(chosen - rejected).mean()


def gae(reward, value, lam=0.95):  # of each digit, of the text before it → advantages, returns (4, n, 2)
    reward_a, reward_b = reward.unbind(2)
    value_a, value_b = value.unbind(2)
    delta_a = reward_a + value_b - value_a
    delta_b = reward_b - value_b  # nothing follows b
    adv_a = delta_a + lam * delta_b
    adv = torch.stack([adv_a, delta_b], 2)
    return adv, adv + value


def policy_loss(logp, old_logp, adv, clip=0.2):  # (4, n, 2) each
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(-adv * ratio, -adv * clipped)
    return loss.mean()


def value_loss(value, ret):  # what the critic says, what came (4, n, 2)
    error = value - ret
    return 0.5 * error.square().mean()


def train(seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(20, 4).requires_grad_()
    ref_logp = log_probs(logits.detach())
    y = sample(ref_logp, 16_000)  # 64,000 pairs, each of two answers to one prompt
    z = sample(ref_logp, 16_000)
    p_win = (REWARD[y] - REWARD[z]).sigmoid()
    wins = p_win.bernoulli().bool()  # a label is right with this probability only
    chosen = y.where(wins, z)
    rejected = z.where(wins, y)
    score = torch.zeros(64).requires_grad_()  # the reward model: a number for each text
    opt = Adam([score], 0.1)
    for _ in range(200):
        loss = pairwise_loss(score[chosen], score[rejected])
        opt.zero_grad()
        loss.backward()
        opt.step()
    critic = torch.zeros(20).requires_grad_()
    opt = Adam([logits, critic], 0.02)
    for step in range(400):
        with torch.no_grad():
            old_logp = log_probs(logits)
            y = sample(old_logp)
            reward = -BETA * (old_logp - ref_logp)[y]
            reward[:, :, 1] += score[y]
            adv, ret = gae(reward, critic[ROW[y]])
        for _ in range(4):
            logp = log_probs(logits)
            loss = policy_loss(logp[y], old_logp[y], adv)
            loss += value_loss(critic[ROW[y]], ret)
            opt.zero_grad()
            loss.backward()
            opt.step()
        if step % 20 == 19:
            probs = log_probs(logits).sum(1).exp()
            mean = (probs * REWARD).sum() / 4  # over all texts, without sampling
            print(f"{step + 1:4}  reward {mean:.3f} {'#' * round(10 * mean.item())}")
    return logits


if __name__ == "__main__":
    train()
