import torch


def pad_right(rows, pad_id):
    lengths = torch.tensor([len(row) for row in rows])
    T = int(lengths.max())
    padded = [list(row) + [pad_id] * (T - len(row)) for row in rows]
    return torch.tensor(padded), lengths


def response_mask(prompt_lens, lengths, T):
    position = torch.arange(T)
    return (position >= prompt_lens[:, None]) & (position < lengths[:, None])


def token_log_probs(logits, tokens):
    logp = logits[:, :-1].log_softmax(-1)
    at_token = logp.gather(2, tokens[:, 1:, None]).squeeze(2)
    return torch.cat((torch.zeros_like(at_token[:, :1]), at_token), dim=1)


def sft_loss(logp, mask, denom):
    return -torch.where(mask, logp, 0.0).sum() / denom
