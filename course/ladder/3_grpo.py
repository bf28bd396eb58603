"""3 · GRPO: the baseline is that of the prompt, and each batch serves four updates, within a clip.

    A = (r − mean) / σ  of the 8 answers to one prompt,     ρ = π / π_old  of each digit
    loss = mean max(−A ρ, −A clip(ρ, 1 ± 0.2))

Task and policy are those of 1_reinforce.py.
"""

import torch
from torch.optim import Adam

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


def advantages(reward):  # (4, n) → (4, n, 1), distance from the prompt's mean in the prompt's σ
    mean = reward.mean(1, keepdim=True)
    std = reward.std(1, keepdim=True)
    adv = (reward - mean) / (std + 1e-6)
    return adv.unsqueeze(2)


def policy_loss(logp, old_logp, adv, clip=0.2):  # log-probs now, when sampled (4, n, 2); adv (4, n, 1)
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(-adv * ratio, -adv * clipped)
    return loss.mean()


def train(seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(20, 4).requires_grad_()
    opt = Adam([logits], 0.02)
    for step in range(400):
        with torch.no_grad():
            old_logp = log_probs(logits)
            y = sample(old_logp)
            adv = advantages(REWARD[y])
        for _ in range(4):
            logp = log_probs(logits)
            loss = policy_loss(logp[y], old_logp[y], adv)
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
