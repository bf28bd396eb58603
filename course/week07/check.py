import math

import torch

from course.checking import call, demand, expect, gradient, random, tensor

POINTS = {
    "kl_estimate": 3,
    "optimal_policy": 3,
    "dpo_loss": 3,
    "ipo_loss": 2,
    "kto_reference": 2,
    "best_of_n_kl": 1,
}


def check_kl_estimate(kl_estimate):
    p = tensor([0.5, 0.3, 0.2])
    q = tensor([0.2, 0.3, 0.5])
    exact = (p * (p / q).log()).sum()
    backwards = (q * (q / p).log()).sum()
    for kind, want in (
        ("k1", (p / q).log()),
        ("k2", (p / q).log().square() / 2),
        ("k3", q / p - 1 - (q / p).log()),
    ):
        got = call(kl_estimate, p.log(), q.log(), kind)
        expect(got, want, f"{kind} of tokens with π = (0.5, 0.3, 0.2), π_ref = (0.2, 0.3, 0.5)", {
            "the sign is wrong: k1 is log π − log π_ref, positive where the policy likes the token more":
                -want,
            "the ratio is upside down: k3 has π_ref/π in it": p / q - 1 - (p / q).log(),
            "the factor ½ is missing": 2 * want,
            "the −1 is missing: k3 must be 0 where the two agree": q / p - (q / p).log(),
            "the log term has the wrong sign": q / p - 1 + (q / p).log(),
            "you weigh with π already: the mean over samples does that": p * want,
            "this is k1": (p / q).log(),
            "you return a sum or a mean: one number for each token": want.sum().expand(3),
        })  # fmt: skip
        if kind != "k2":
            expect((p * got).sum(), exact, f"the expectation of {kind} under π, which is KL(π‖π_ref)", {
                "this is the KL the other way round": backwards,
            })  # fmt: skip


def check_optimal_policy(optimal_policy):
    ref = tensor([0.6, 0.3, 0.1])
    reward = tensor([0.0, 1.0, 3.0])
    tilted = ref * (reward / 0.5).exp()
    want = (tilted / tilted.sum()).log()
    times = ref * (reward * 0.5).exp()
    less = ref * (-reward / 0.5).exp()
    no_beta = ref * reward.exp()
    got = call(optimal_policy, ref.log(), reward, 0.5)
    where = "optimal_policy for π_ref = (0.6, 0.3, 0.1), rewards (0, 1, 3), beta 0.5"
    expect(got, want, where, {
        "the result is not normalised: its probabilities must sum to 1": tilted.log(),
        "these are probabilities, and log-probs are asked for": want.exp(),
        "you multiply the reward by beta: it is divided, so that a small beta lets the policy move far":
            (times / times.sum()).log(),
        "the reward has the wrong sign: good responses became rare": (less / less.sum()).log(),
        "beta is forgotten": (no_beta / no_beta.sum()).log(),
        "the reference is forgotten: this is a softmax of the rewards alone": (reward / 0.5).log_softmax(0),
        "the reward is added to the probabilities: it tilts them by a factor, exp(reward / beta)":
            ((ref + reward / 0.5) / (ref + reward / 0.5).sum()).log(),
    })  # fmt: skip
    big = call(optimal_policy, ref.log(), 1000 * reward, 0.5)
    demand(
        torch.as_tensor(big).isfinite().all(),
        "for rewards of 1,000 the result is not finite: exp(reward / beta) is infinite. Add reward / beta "
        "to the log-probs and normalise with log_softmax",
    )


def pairs():
    return random(4), random(4, seed=1) - 1, random(4, seed=2), random(4, seed=3)


def check_dpo_loss(dpo_loss):
    w, l, ref_w, ref_l = pairs()
    beta = 0.3
    margin = (w - ref_w) - (l - ref_l)

    def loss(x):
        return (1 + (-x).exp()).log()

    got = call(dpo_loss, w, l, ref_w, ref_l, beta)
    expect(got, loss(beta * margin), "dpo_loss of four pairs, beta 0.3", {
        "chosen and rejected are swapped: the margin of the chosen response is to grow": loss(-beta * margin),
        "your loss has the wrong sign: it is minus a log-likelihood": -loss(beta * margin),
        "beta is forgotten": loss(margin),
        "beta stands outside the sigmoid: it scales the margin": beta * loss(margin),
        "the reference is forgotten: nothing holds the policy near it": loss(beta * (w - l)),
        "the reference has the wrong sign: log π/π_ref is log π − log π_ref":
            loss(beta * (w + ref_w - l - ref_l)),
        "you return the mean: one loss for each pair": loss(beta * margin).mean().expand(4),
        "the log is missing: this is the probability of the label": 1 / (1 + (-beta * margin).exp()),
        "this is the loss without its sigmoid": -beta * margin,
    })  # fmt: skip
    zero = tensor([0.0])
    far = call(dpo_loss, tensor([-900.0]), zero, zero, zero, 1.0)
    demand(
        torch.as_tensor(far).isfinite().all(),
        "at a margin of -900 the loss is not finite: take torch.nn.functional.logsigmoid",
    )
    grad = gradient(lambda x: dpo_loss(x, l, ref_w, ref_l, beta).sum(), ref_w + l - ref_l)
    expect(grad, torch.full((4,), -beta / 2).double(), "∂loss/∂logp_w at a margin of 0, which is −beta/2")


def check_ipo_loss(ipo_loss):
    w, l, ref_w, ref_l = pairs()
    beta = 0.25
    margin = (w - ref_w) - (l - ref_l)
    got = call(ipo_loss, w, l, ref_w, ref_l, beta)
    expect(got, (margin - 2).square(), "ipo_loss of four pairs, beta 0.25, where the target is 2 nats", {
        "chosen and rejected are swapped": (-margin - 2).square(),
        "the target is 1 / (2 beta), and yours is 1 / beta": (margin - 4).square(),
        "the target is 1 / (2 beta), and yours is beta / 2": (margin - beta / 2).square(),
        "the target is 1 / (2 beta), and yours is 1 / 2: beta scales the target": (margin - 0.5).square(),
        "you scale the margin by beta: in IPO beta stands in the target alone": (beta * margin - 2).square(),
        "the square is missing": margin - 2,
        "the reference is forgotten": (w - l - 2).square(),
        "you return the mean: one loss for each pair": (margin - 2).square().mean().expand(4),
        "the target has the wrong sign: the margin is to come to +1 / (2 beta)": (margin + 2).square(),
    })  # fmt: skip


def check_kto_reference(kto_reference):
    logp = tensor([-8.0, -9.0, -7.0])
    ref = tensor([-8.5, -9.1, -7.3])
    expect(call(kto_reference, logp, ref), 0.3, "kto_reference of log-ratios 0.5, 0.1, 0.3", {
        "the sign is wrong: it is the mean of logp − ref_logp": -0.3,
        "the sign is wrong: ref_logp − logp is negative here, and was clamped to 0": 0.0,
        "you sum, and it is the mean over the responses": 0.9,
    })  # fmt: skip
    expect(call(kto_reference, ref, logp), 0.0, "kto_reference of log-ratios -0.5, -0.1, -0.3", {
        "a negative mean must become 0: a KL is never negative": -0.3,
    })  # fmt: skip
    mixed = call(kto_reference, tensor([-8.0, -9.0]), tensor([-9.0, -8.4]))
    expect(mixed, 0.2, "kto_reference of log-ratios 1 and -0.6", {
        "you clamp each response at 0 before the mean: it is the mean that is clamped": 0.5,
    })  # fmt: skip
    leaf = logp.clone().requires_grad_()
    demand(
        not getattr(kto_reference(leaf, ref), "requires_grad", False),
        "a gradient flows through z0: it is a constant in KTO's loss (detach it), or the policy would "
        "learn to move the reference point",
    )


def check_best_of_n_kl(best_of_n_kl):
    for n in (1, 2, 4, 64):
        expect(best_of_n_kl(n), math.log(n) - 1 + 1 / n, f"best_of_n_kl({n})", {
            "this is log n alone: (n − 1)/n is to be subtracted": math.log(n),
            "the sign of (n − 1)/n is wrong: it is subtracted": math.log(n) + 1 - 1 / n,
            "you subtract 1/n, and it is (n − 1)/n": math.log(n) - 1 / n,
            "the logarithm is to base 2, and nats are asked for": math.log2(n) - 1 + 1 / n,
            "you subtract n/(n + 1), and it is (n − 1)/n": math.log(n) - n / (n + 1),
        }, tol=1e-6)  # fmt: skip
