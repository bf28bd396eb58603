import torch

from course.checking import call, demand, expect, gradient, random, tensor

POINTS = {"pairwise_loss": 3, "reward_at_end": 2, "process_score": 3}


def check_pairwise_loss(pairwise_loss):
    chosen = tensor([2.0, 0.5, 1.0])
    rejected = tensor([0.0, 0.5, 3.0])
    margin = chosen - rejected
    losses = (1 + (-margin).exp()).log()
    flipped = (1 + margin.exp()).log()
    probabilities = 1 / (1 + (-margin).exp())
    same_loss = flipped.mean()  # these margins are 2, 0 and −2: the mean cannot tell which one was chosen
    expect(call(pairwise_loss, chosen, rejected), losses.mean(), "pairwise_loss for margins 2, 0 and -2", {
        "your loss has the wrong sign: it is minus the log-likelihood": -same_loss,
        "you sum over the pairs: it is their mean": losses.sum(),
        "the log is missing: this is the probability of the labels": probabilities.mean(),
        "the log is missing: this is 1 − the probability of the labels": 1 - probabilities.mean(),
    })  # fmt: skip
    expect(call(pairwise_loss, chosen + 1, rejected), (1 + (-margin - 1).exp()).log().mean(),
           "pairwise_loss for margins 3, 1 and -1", {
        "chosen and rejected are swapped: the chosen response is to get the *higher* reward":
            (1 + (margin + 1).exp()).log().mean(),
    })  # fmt: skip
    for gap, want in ((-200.0, 200.0), (200.0, 0.0), (-900.0, 900.0)):
        got = call(pairwise_loss, torch.tensor([gap]), torch.tensor([0.0]))
        demand(
            torch.as_tensor(got).isfinite().all(),
            f"at a margin of {gap:g} your loss is not finite: σ is exactly 0 there in fp32, and its log "
            "-inf. torch.nn.functional.logsigmoid is right everywhere",
        )
        expect(got, want, f"pairwise_loss at a margin of {gap:g}")
    grad = gradient(pairwise_loss, tensor([0.0]), tensor([0.0]))
    expect(grad, tensor([-0.5]), "∂loss/∂chosen at a margin of 0")


def check_reward_at_end(reward_at_end):
    values = random(3, 5)
    lengths = torch.tensor([5, 3, 1])
    got = call(reward_at_end, values, lengths)
    want = torch.stack([values[0, 4], values[1, 2], values[2, 0]])
    real = torch.arange(5) < lengths[:, None]
    means = torch.where(real, values, 0.0).sum(1) / lengths
    expect(got, want, "reward_at_end of random values (3, 5) with lengths 5, 3, 1", {
        "you read the last column: for a short row that is a pad": values[:, -1],
        "you read one token before the end: index lengths − 1 is the last token":
            torch.stack([values[0, 3], values[1, 1], values[2, -1]]),
        "you read one token behind the end: index lengths − 1 is the last token, as indices start at 0":
            torch.stack([values[0, 4], values[1, 3], values[2, 1]]),
        "you take the mean over the tokens: only at the last one has the model read everything": means,
        "you take the sum over the tokens: only at the last one has the model read everything":
            means * lengths,
        "you read the first token": values[:, 0],
    })  # fmt: skip


def check_process_score(process_score):
    logits = tensor([[0.0, 7.0, 1.0, -2.0], [2.0, 1.0, -1.0, 7.0]])
    ends = torch.tensor([[True, False, True, True], [False, True, True, False]])
    p = torch.sigmoid(logits)
    want = torch.where(ends, p, 1.0).prod(1)
    count = ends.sum(1)
    lowest = torch.where(ends, p, 1.0).amin(1)
    expect(call(process_score, logits, ends), want, "process_score for two responses of "
                                                    "three and two steps", {
        "the mask is forgotten: tokens that end no step count too": p.prod(1),
        "you take the mean of the steps' probabilities: one wrong step makes the whole wrong, so it is the "
        "product": torch.where(ends, p, 0.0).sum(1) / count,
        "you sum the steps' probabilities: they have to be multiplied": torch.where(ends, p, 0.0).sum(1),
        "you take the smallest of the steps: the exercise asks for the product": lowest,
        "this is the log of the product: the exp at the end is missing": want.log(),
        "you take the geometric mean: a product has no root": want ** (1 / count),
        "tokens outside `ends` count as ½: put 0 where the *log* is summed, not for the logit":
            torch.sigmoid(torch.where(ends, logits, 0.0)).prod(1),
        "you read the last step alone": torch.stack([p[0, 3], p[1, 2]]),
    })  # fmt: skip
    every = torch.ones(1, 4).bool()
    grad = gradient(lambda x: process_score(x, every).sum(), torch.full((1, 4), -200.0))
    demand(
        grad.isfinite().all(),
        "at logits of -200 the gradient is nan: log(sigmoid(x)) is log(0) there; F.logsigmoid is right",
    )
