import torch

from course.checking import Wrong, call, demand, expect, gradient, random, tensor

POINTS = {"fit_sigmoid": 4, "distillation_loss": 3, "mean_over_ranks": 1}


def curve(compute, start, A, B, C_mid):
    return start + (A - start) / (1 + (C_mid / compute) ** B)


def check_fit_sigmoid(fit_sigmoid):
    compute = torch.logspace(0, 1.6, 25).double()
    for start, A, B, C_mid in ((0.4, 0.95, 2.0, 8.0), (0.1, 0.6, 1.2, 3.0), (0.0, 0.8, 4.0, 15.0)):
        reward = curve(compute, start, A, B, C_mid)
        result = call(fit_sigmoid, compute, reward, start)
        demand(isinstance(result, tuple) and len(result) == 3, "return three floats: A, B, C_mid")
        a, b, middle = map(float, result)
        found = f"found A = {a:.3f}, B = {b:.2f}, C_mid = {middle:.2f}"
        right = f"right are {A}, {B}, {C_mid}, on a curve that begins at {start}"
        if abs(a - (A - start)) < 0.02 and abs(a - A) > 0.02:
            raise Wrong(f"A is the gain, and the ceiling is asked for, start + gain. {found}; {right}")
        if abs(b + B) < 0.2:
            raise Wrong(f"the sign of B is wrong: the reward rises with compute for B > 0. {found}; {right}")
        if abs(middle * C_mid - 1) < 0.1 and abs(middle - C_mid) > 0.1:
            raise Wrong(
                f"C_mid is upside down: in the formula it is divided by the compute. {found}; {right}"
            )
        error = (curve(compute, start, a, b, middle) - reward).abs().max().item()
        if abs(a - reward.max().item()) < 1e-6 and abs(a - A) > 0.01:
            raise Wrong(
                f"A is the largest reward seen: the ceiling lies above it, and has to be fitted. {found}; "
                f"{right}"
            )
        demand(
            abs(a - A) < 0.02 and error < 0.01,
            f"the fit is off by up to {error:.3f}: {found}; {right}. Is the grid too coarse or too "
            "narrow, or A not the best one for each B and C_mid?",
        )
        demand(
            abs(b / B - 1) < 0.1 and abs(middle / C_mid - 1) < 0.1, f"close, but not there: {found}; {right}"
        )
    flat = call(fit_sigmoid, compute, torch.full((25,), 0.3).double(), 0.3)
    demand(
        0.3 - 1e-6 <= float(flat[0]) <= 1,
        f"a run that gains nothing has A = start = 0.3, and not {flat[0]:.3f}",
    )
    steep = curve(compute, 0.2, 1.0, 0.5, 30.0) + 0.05 * (compute > 20)
    top = float(call(fit_sigmoid, compute, steep, 0.2)[0])
    demand(
        top <= 1 + 1e-6,
        f"A is {top:.3f}: a reward of at most 1 has no ceiling above 1. Clamp A to [start, 1]",
    )


def check_distillation_loss(distillation_loss):
    student = random(2, 3, 5)
    teacher = random(2, 3, 5, seed=1)
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]]).bool()
    logp = student.log_softmax(-1)
    logq = teacher.log_softmax(-1)

    def total(per_token):
        return torch.where(mask, per_token, 0.0).sum() / 3

    reverse = (logp.exp() * (logp - logq)).sum(-1)
    forward = (logq.exp() * (logq - logp)).sum(-1)
    where = "distillation_loss of random logits (2, 3, 5), three tokens in the mask, denom 3"
    expect(call(distillation_loss, student, teacher, mask, 3), total(reverse), where, {
        "this is the KL the other way round, KL(teacher‖student): the average is taken under the student":
            total(forward),
        "your loss has the wrong sign": -total(reverse),
        "the mask is forgotten": reverse.sum() / 3,
        "you average over the vocabulary: a KL is a sum over v": total(reverse) / 5,
        "you do not divide by denom": total(reverse) * 3,
        "this is the cross-entropy: the student's own log-probs are missing":
            total(-(logp.exp() * logq).sum(-1)),
        "this is the cross-entropy under the teacher, as in supervised distillation":
            total(-(logq.exp() * logp).sum(-1)),
        "the logits are not normalised": total((logp.exp() * (student - teacher)).sum(-1)),
        "you average over the rows' means": ((reverse * mask).sum(1) / mask.sum(1)).mean(),
    })  # fmt: skip
    got = call(distillation_loss, student, teacher, mask, 6)
    expect(got, total(reverse) / 2, "distillation_loss of random logits, three tokens, denom 6", {
        "you take the mean over the mask: it is denom, the tokens of the whole step": total(reverse),
    })  # fmt: skip
    leaf = teacher.clone().requires_grad_()
    loss = distillation_loss(student.clone().requires_grad_(), leaf, mask, 3)
    into = torch.autograd.grad(loss, leaf, allow_unused=True)[0]
    demand(
        into is None or not into.any(),
        "a gradient flows into the teacher: it is a constant, or it would come to meet its student",
    )
    grad = gradient(distillation_loss, student, teacher, mask, 3)
    want = logp.exp() * (logp - logq - reverse[..., None])
    expect(grad, torch.where(mask[..., None], want, 0.0) / 3, "∂loss/∂student_logits", {
        "part of the gradient is missing: p stands in front of the logarithm and depends on the student too, "
        "so it must not be detached": torch.zeros_like(want),
    })  # fmt: skip


def check_mean_over_ranks(mean_over_ranks):
    sums = tensor([6.0, 4.0, 0.0])
    counts = torch.tensor([3, 1, 0])
    expect(call(mean_over_ranks, sums[:2], counts[:2]), 2.5, "mean_over_ranks([6, 4], [3, 1])", {
        "this is the mean of the GPUs' means: add up all sums and all counts first": 3.0,
        "you divide by the number of GPUs, and not by the tokens": 5.0,
        "this is the sum of the means": 6.0,
        "this is the sum: it is not divided by the tokens": 10.0,
        "the result is weighted twice by the counts": 22 / 4,
    })  # fmt: skip
    expect(call(mean_over_ranks, sums, counts), 2.5, "mean_over_ranks([6, 4, 0], [3, 1, 0])")
