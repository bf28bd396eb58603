import torch


def log_probs(logits, tokens, temperature):
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, tokens[:, None]).squeeze(1)


def entropy(logits):
    logp = logits.log_softmax(-1)
    p = logp.exp()
    return torch.where(p > 0, -p * logp, 0.0).sum(-1)


def sample_token(logits, u, temperature):
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    smaller = cumulative <= u[:, None]
    return smaller.sum(-1).clamp(max=logits.shape[1] - 1)


def merge(ids, pair, new_id):
    out = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == tuple(pair):
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def cached_attention(q, k, v, cache_k, cache_v):
    new_k = torch.cat((cache_k, k[None]))
    new_v = torch.cat((cache_v, v[None]))
    scores = new_k @ q / len(q) ** 0.5
    return scores.softmax(0) @ new_v, new_k, new_v
