"""6 · DPO: the same pairs and the same best policy, without a reward model, a critic or a sample.

The best policy is π ∝ π_ref exp(r / BETA). So its reward is r = BETA log π/π_ref, up to a constant of the
prompt. The constant cancels in a comparison, and the loss of the reward model becomes a loss of the policy.
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


def preference_loss(logp_w, logp_l, ref_w, ref_l):  # log π, log π_ref of the winners and of the others
    h_w = logp_w - ref_w
    h_l = logp_l - ref_l
    return -logsigmoid(BETA * (h_w - h_l))


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
    ref = ref_logp.sum(1)
    opt = Adam([logits], 0.02)
    for step in range(400):
        logp = log_probs(logits).sum(1)
        losses = preference_loss(logp[chosen], logp[rejected], ref[chosen], ref[rejected])
        loss = losses.mean()
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
