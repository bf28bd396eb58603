"""4 · PPO: a critic learns what to expect after each text, so every digit has a baseline of its own.

    δ_t = r_t + V(next text) − V(text),     A_t = δ_t + λ δ_{t+1}                        GAE
    loss = mean max(−A ρ, −A clip(ρ, 1 ± 0.2)) + mean ½ (V − return)²

Task and policy are those of 1_reinforce.py. The reward comes with the second digit.
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
    critic = torch.full([20], 4.0)  # about what a random answer gets
    critic.requires_grad_()
    opt = Adam([logits, critic], 0.02)
    for step in range(400):
        with torch.no_grad():
            old_logp = log_probs(logits)
            y = sample(old_logp)
            reward = torch.zeros(4, 8, 2)
            reward[:, :, 1] = REWARD[y]
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
