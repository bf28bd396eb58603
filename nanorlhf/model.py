"""The hand-written GPT: GPT-2, Llama, Qwen or Pythia by configuration, with a KV cache and a scalar head.

    tokens (B, T) → embedding → n_layer × [x + attention(norm(x)); x + mlp(norm(x))] → norm → hidden (B, T, D)

The model returns *hidden states*; log-probs come from `GPT.logprobs`, which sends only the positions that are
asked for through the unembedding (`nanorlhf.kernels.linear_logprob`), so that B×T×V logits are never stored
in training.

There is no dropout anywhere. In RL the same token is scored by the sampler, by the update and by the
reference; with dropout those three would be different random networks, the importance ratio would not be 1 on
fresh samples and the KL penalty would punish noise (detail 7 of "The N+ Implementation Details of RLHF with
PPO", arXiv 2403.17031).

Sources: GPT-2 (Radford et al. 2019), Llama (arXiv 2302.13971), RMSNorm (arXiv 1910.07467), rotary positions
(arXiv 2104.09864, half-split as in Llama's published weights), SwiGLU (arXiv 2002.05202), grouped-query
attention (arXiv 2305.13245), longer contexts by slower rotation (Llama 3.1, arXiv 2407.21783), norms of
queries and keys (Qwen3, arXiv 2505.09388), attention and MLP side by side (GPT-NeoX, arXiv 2204.06745).
"""

import copy
import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanorlhf.errors import UserError
from nanorlhf.kernels import decode_attention, linear_logprob
from nanorlhf.kernels.torch_backend import spans

CACHED = 1024  # rows of the unembedding at once: they stay in a CPU's cache, a third faster
MM_FP32 = "dtype" in torch.ops.aten.mm.overloads()  # torch 2.8 and later, on CUDA


@dataclass
class GPTConfig:
    vocab_size: int
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 96  # width D of the residual stream
    n_kv_head: int = 0  # key/value heads (grouped-query attention); 0: as many as n_head
    head_dim: int = 0  # 0: d_model / n_head
    d_ff: int = 0  # hidden width of the MLP; 0: 4·D, or 8/3·D rounded up to 16 with SwiGLU
    max_len: int = 128  # longest sequence, prompt and response together
    norm: str = "layer"  # layer | rms
    norm_eps: float = 1e-5
    pos: str = "learned"  # learned | rope
    rope_theta: float = 10000.0
    rope_share: float = 1.0  # of a head's channels, the share that rotates (Pythia: a quarter)
    rope_scaling: tuple = ()  # Llama 3.1: (factor, low_freq_factor, high_freq_factor, original max_len)
    qk_norm: bool = False  # norms of each head's queries and keys (Qwen3)
    mlp: str = "gelu"  # gelu (tanh form, as GPT-2) | gelu_exact (Pythia) | swiglu
    parallel: bool = False  # x + attention + mlp of the same x (Pythia)
    qkv_bias: bool = True  # biases on the linear layers (the norms follow their own kind)
    o_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True  # the unembedding is the embedding

    def __post_init__(self):
        kinds = dict(norm=("layer", "rms"), pos=("learned", "rope"), mlp=("gelu", "gelu_exact", "swiglu"))
        optional = ("n_kv_head", "head_dim", "d_ff")  # 0: see above
        self.rope_scaling = tuple(self.rope_scaling)
        numbers = {f"rope_scaling[{i}]": x for i, x in enumerate(self.rope_scaling)}
        for f in fields(self):
            value = getattr(self, f.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if f.type is str and value not in kinds[f.name]:
                raise UserError(f"{f.name}={value!r} must be {' or '.join(kinds[f.name])}")
            if f.type is int and not (whole and value >= (f.name not in optional)):
                raise UserError(f"{f.name}={value!r} must be a positive whole number")
            if f.type is bool and not isinstance(value, bool):
                raise UserError(f"{f.name}={value!r} must be true or false")
            if f.type is float:
                numbers[f.name] = value
        for name, value in numbers.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf):
                raise UserError(f"{name}={value!r} must be a positive number")
        if not self.head_dim and self.d_model % self.n_head:
            raise UserError(f"n_head={self.n_head} must divide d_model={self.d_model}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.d_model // self.n_head
        if not self.d_ff:
            self.d_ff = 4 * self.d_model
            if self.mlp == "swiglu":
                self.d_ff = 16 * math.ceil(8 * self.d_model / 3 / 16)
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")
        if self.pos == "rope" and (self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim):
            share = "" if self.rope_share == 1 else f" of which {self.rope_dim} rotate"
            raise UserError(f"rotary positions need an even head_dim, got {self.head_dim}{share}")
        scaling = self.rope_scaling
        if scaling and not (len(scaling) == 4 and scaling[1] < scaling[2]):
            raise UserError(f"rope_scaling={scaling} must be (factor, low, high, original) with low < high")

    @property
    def rope_dim(self):
        """Channels of a head that rotate; the others carry no position."""
        return int(self.head_dim * self.rope_share)

    @classmethod
    def gpt2(cls, vocab_size, **kw):
        return cls(vocab_size, **kw)

    @classmethod
    def llama(cls, vocab_size, **kw):
        no_bias = dict(qkv_bias=False, o_bias=False, mlp_bias=False)
        return cls(vocab_size, **{**dict(norm="rms", pos="rope", mlp="swiglu"), **no_bias, **kw})


class Linear(nn.Linear):
    """Weights stay in their own (master) precision and are cast to the activations' dtype at use."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """LayerNorm (mean and variance) or RMSNorm (root mean square, no bias), computed in at least fp32."""

    def __init__(self, cfg, width=0):
        super().__init__()
        self.eps, width = cfg.norm_eps, width or cfg.d_model
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if cfg.norm == "layer" else None

    def forward(self, x):
        y = x if x.dtype == torch.float64 else x.float()
        if self.bias is not None:
            y = F.layer_norm(y, y.shape[-1:], self.weight.to(y.dtype), self.bias.to(y.dtype), self.eps)
        else:
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.to(y.dtype)
        return y.to(x.dtype)


@lru_cache(maxsize=16)
def rope_table(dim, max_len, theta, device, scaling=()):
    """(max_len, dim/2) cosines and sines. No buffer: `model.bfloat16()` must not round them.

    scaling (factor, low, high, original): what turns less than `low` times within the original context turns
    `factor` times slower, what turns more than `high` times stays, and between the two it is interpolated.
    """
    # Rounded as where the models were trained: at position 10,000 the last bit is 1e-3 of the angle
    freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling:
        factor, low, high, original = scaling
        turns = original * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / factor
    angle = torch.arange(max_len, dtype=torch.float32)[:, None] * freq
    return angle.cos().to(device), angle.sin().to(device)


def rotate(x, cos, sin):
    """Rotary positions for x (B, H, T, hd); cos, sin (B or 1, 1, T, r/2). Pairs are (i, i + r/2), i < r/2."""
    r = cos.shape[-1]
    a, b, rest = x.to(torch.promote_types(x.dtype, cos.dtype)).split((r, r, x.shape[-1] - 2 * r), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of every layer, preallocated: (n_layer, 2, B, n_kv_head, max_len, head_dim)."""

    def __init__(self, cfg, batch, max_len, device, dtype):
        shape = (cfg.n_layer, 2, batch, cfg.n_kv_head, max_len, cfg.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)

    def fill(self, to, source, rows, live):
        """Rows `to` take over the first `live` positions of rows `rows` of another cache, or of this one."""
        self.kv[:, :, to, :, :live] = source.kv[:, :, rows, :, :live]

    def first(self, batch):
        """The first rows alone, as a cache that shares their memory."""
        part = copy.copy(self)
        part.kv = self.kv[:, :, :batch]
        return part

    def keep(self, rows, live):
        """Only the given rows stay, in ascending order. Copied in place: nothing new is allocated."""
        for new, old in enumerate(rows.tolist()):
            if new != old:
                self.kv[:, :, new, :, :live] = self.kv[:, :, old, :, :live]
        self.kv = self.first(len(rows)).kv


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, q, kv = cfg, cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
        self.q = Linear(cfg.d_model, q, bias=cfg.qkv_bias)
        self.k = Linear(cfg.d_model, kv, bias=cfg.qkv_bias)
        self.v = Linear(cfg.d_model, kv, bias=cfg.qkv_bias)
        self.o = Linear(q, cfg.d_model, bias=cfg.o_bias)
        self.q_norm, self.k_norm = (Norm(cfg, cfg.head_dim) if cfg.qk_norm else None for _ in "qk")

    def forward(self, x, rope, layer_cache, step, mask):
        B, T, _ = x.shape
        parts = (f(x).view(B, T, -1, self.cfg.head_dim) for f in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, H, T, hd)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if step is None:
            gqa = dict(enable_gqa=True) if self.cfg.n_kv_head != self.cfg.n_head else {}
            if layer_cache is not None:  # prefill: positions 0 … T-1 of every row
                layer_cache[0, :, :, :T], layer_cache[1, :, :, :T] = k, v
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **gqa)
        else:  # decode: one new token per row, each written at its row's own position
            q, k, v = (x[:, :, 0] for x in (q, k, v))  # (B, H, hd)
            y = decode_attention(q, k, v, layer_cache[0], layer_cache[1], *step)[:, :, None]
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.up = Linear(cfg.d_model, cfg.d_ff, bias=cfg.mlp_bias)
        self.down = Linear(cfg.d_ff, cfg.d_model, bias=cfg.mlp_bias)
        self.gate = Linear(cfg.d_model, cfg.d_ff, bias=cfg.mlp_bias) if cfg.mlp == "swiglu" else None
        self.approximate = "tanh" if cfg.mlp == "gelu" else "none"

    def forward(self, x):
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = Norm(cfg), Attention(cfg), Norm(cfg), MLP(cfg)
        self.parallel = cfg.parallel

    def forward(self, x, rope, layer_cache, step, mask):
        attended = x + self.attn(self.norm1(x), rope, layer_cache, step, mask)  # detail 7: no dropout
        return attended + self.mlp(self.norm2(x if self.parallel else attended))


class GPT(nn.Module):
    """A decoder-only transformer. Right padding only: a pad can then never touch a real token."""

    PASSES = ("logprobs",)  # the methods, besides forward, that other processes may have to take part in

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.compute_dtype = None  # dtype of the activations; None: that of the weights
        self.recompute = False  # --save_memory
        self.n_ids = cfg.vocab_size  # ids that exist: published models pad their matrices beyond them
        self.stop_ids = ()  # ids that end a response besides the tokenizer's EOS (chat models have several)
        self.source = None  # what hub.load keeps of a folder for hub.save
        self.wte = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.wpe = nn.Embedding(cfg.max_len, cfg.d_model) if cfg.pos == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = Norm(cfg)
        self.lm_head = None if cfg.tied else Linear(cfg.d_model, cfg.vocab_size, bias=False)
        # Every matrix starts at N(0, 1/√fan_in), whatever the width (0.02 suits GPT-2's 768 and is far too
        # small for 64); the embedding is the unembedding, so D is its fan-in too. Residual outputs start
        # smaller, so that depth does not add variance (GPT-2).
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * ((2 * cfg.n_layer) ** -0.5 if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def unembedding(self):
        """The (V, D) matrix from hidden states to logits, in the dtype of the activations. V = n_ids: what is
        no id has no probability."""
        weight = self.wte.weight if self.lm_head is None else self.lm_head.weight
        weight = weight if self.n_ids == len(weight) else weight[: self.n_ids]
        return weight.to(self.compute_dtype or weight.dtype)

    @property
    def device(self):
        mesh = getattr(self.wte.weight, "device_mesh", None)  # with --save_memory pieces lie elsewhere
        return torch.device(mesh.device_type) if mesh else self.wte.weight.device

    def new_cache(self, batch, max_len):
        return KVCache(self.cfg, batch, max_len, self.device, self.compute_dtype or self.wte.weight.dtype)

    def forward(self, tokens, cache=None, pos=None, live=None, doc=None):
        """tokens (B, T) int64 → hidden states (B, T, D), after the last norm.

        With a cache and no `pos`: prefill, positions 0 … T-1. With `pos` (B,) and T = 1: decode, each row's
        token stands at its own position, and `live` bounds them all: pos < live. Without `live` the host
        asks for the largest, and a GPU has to wait. With `doc` (B, T) int64, and no cache: rows hold several
        documents, one after the other (`data.pack`); where the number changes another begins, which sees
        nothing to its left and whose positions start at 0. Raises UserError past `max_len`: rotary positions
        would extrapolate in silence.
        """
        T = tokens.shape[1]
        if T > self.cfg.max_len:
            raise UserError(f"a sequence of {T} tokens exceeds the model's context of {self.cfg.max_len}")
        where = torch.arange(T, device=tokens.device)[None] if pos is None else pos[:, None]  # (1 or B, T)
        if doc is not None:
            begins = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0))
            start = (where * begins).cummax(1).values  # (B, T), where the document of a token begins
            where = where - start
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(where)
        x = x.to(self.compute_dtype or x.dtype)
        rope = step = mask = None  # no mask: causal
        if self.cfg.pos == "rope":
            cfg = self.cfg
            table = rope_table(cfg.rope_dim, cfg.max_len, cfg.rope_theta, tokens.device, cfg.rope_scaling)
            rope = [f[where][:, None] for f in table]  # (1 or B, 1, T, rope_dim/2)
        if pos is not None:
            step = pos, live or int(pos.max()) + 1  # attend over the filled part of the cache only
        if doc is not None:  # 0 or −∞, made once: of a mask of bools attention makes this in every layer
            seen = (start[:, :, None] == start[:, None]).tril()[:, None]
            mask = x.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)  # (B, 1, T, T)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, rope, cache.kv[i], step, mask)
            elif self.recompute and torch.is_grad_enabled():
                args = x, rope, None, None, mask
                x = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, None, None, mask)
        return self.norm(x)

    def head_logits(self, hidden, weight=None):
        """hidden (..., D) → fp32 logits (..., V): bf16 operands are widened, sums never rounded back.

        weight: the unembedding, for a caller that keeps it at hand.
        """
        weight = self.unembedding if weight is None else weight
        if MM_FP32 and hidden.is_cuda and hidden.dim() == 2 and hidden.dtype.itemsize == 2:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # nothing is cast, half is read
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight = hidden.to(wide), weight.to(wide)
        if hidden.device.type != "cpu" or hidden.dim() != 2 or torch.is_grad_enabled():
            return F.linear(hidden, weight)
        logits = hidden.new_empty(len(hidden), len(weight))
        for c in spans(len(weight), CACHED):
            torch.mm(hidden, weight[c].T, out=logits[:, c])
        return logits

    def logits(self, tokens):
        """tokens (B, T) → fp32 logits (B, T, V). For evaluation and tests: training never builds them."""
        return self.head_logits(self(tokens))

    def logprobs(self, tokens, mask, temperature=1.0, loss=None, doc=None):
        """→ logp, entropy (B, T): log π(tokens[b,t] | tokens[b,:t]), and the entropy of that distribution.

        Indexed by the token they describe and 0 where mask is 0; masked positions never enter the head.
        Nothing stands before the first token of a row, or of a document (doc, see `forward`): the mask must
        be 0 there (ValueError otherwise).

        With `loss`, for losses that are sums over tokens, in one pass → total, logp, entropy. It is called as
        loss(logp (n,), entropy (n,), at) for one chunk of tokens after the other, `at` = (row (n,), column
        (n,)) being their places in (B, T). Of what is returned only `total`, their sum, is differentiable.
        """
        mask = mask.bool()
        if mask[:, 0].any() or (doc is not None and (mask[:, 1:] & (doc[:, 1:] != doc[:, :-1])).any()):
            what = "mask[:, 0], and the mask where a document begins, must be 0"
            raise ValueError(f"{what}: a first token has no distribution to be scored under")
        doc = None if doc is None else doc[:, :-1]
        hidden = self(tokens[:, :-1], doc=doc)  # hidden[t-1] predicts token t: the one shift in the code base
        where = row, col = mask.nonzero(as_tuple=True)
        collected = {}

        def part(logp, entropy, r):
            at = row[r], col[r]
            zeros = logp.new_zeros(mask.shape)
            chunk = torch.zeros_like(mask).index_put(at, torch.ones((), dtype=torch.bool, device=mask.device))
            value, stats = loss(zeros.index_put(at, logp), zeros.index_put(at, entropy), chunk)
            for name, x in stats.items():
                collected.setdefault(name, []).append(x.detach())
            return value

        operands = hidden[row, col - 1], self.unembedding, tokens[where], temperature
        *total, logp, entropy = linear_logprob(*operands, loss=part if loss else None)
        zeros = logp.new_zeros(mask.shape)
        logp, entropy = zeros.index_put(where, logp), zeros.index_put(where, entropy)
        if loss:
            return total[0], {name: torch.stack(xs) for name, xs in collected.items()}, logp, entropy
        return logp, entropy


class ScalarModel(nn.Module):
    """A GPT trunk with one number per position: a reward model, or PPO's critic.

    The head starts at N(0, 1/√(D+1)) (detail 11 of N+). `reward_bias` is added to every output; train_rm sets
    it so that reference responses score 0 on average (detail 15 of N+). `step_ids`, the tokens that end a
    step, is None unless the model learnt what is right (train_rm --kind process, outcome).
    """

    PASSES = ("rewards", "values", "logits", "process_rewards")

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.score = Linear(trunk.cfg.d_model, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(trunk.cfg.d_model + 1))  # detail 11
        self.register_buffer("reward_bias", torch.zeros((), dtype=torch.float32))
        self.step_ids = None

    @property
    def cfg(self):
        return self.trunk.cfg

    @property
    def device(self):
        return self.trunk.device

    def head(self, hidden):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return self.score(hidden.to(wide)).squeeze(-1) + self.reward_bias

    def logits(self, tokens):
        """tokens (B, T) → (B, T): the number at every position."""
        return self.head(self.trunk(tokens))

    def rewards(self, tokens, lengths):
        """tokens (B, T), lengths (B,) → (B,): read at each row's last token (detail 12 of N+)."""
        hidden = self.trunk(tokens)
        return self.head(hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])  # detail 12

    def step_ends(self, tokens, mask):
        """tokens (B, T), mask of the response → (B, T) bool, ends of steps; the last token always is one."""
        last = mask & ~F.pad(mask[:, 1:], (0, 1))
        return last | (mask & torch.isin(tokens, torch.tensor(self.step_ids, device=tokens.device)))

    def scores(self, tokens, lengths, mask):
        """tokens, mask (B, T), lengths (B,) → (B,), each model's own way: by steps, or at the last token."""
        return self.rewards(tokens, lengths) if self.step_ids is None else self.process_rewards(tokens, mask)

    def process_rewards(self, tokens, mask):
        """tokens, mask (B, T) → (B,): the product of P(step is right) over the steps (arXiv 2305.20050)."""
        logp = F.logsigmoid(self.head(self.trunk(tokens)))
        return (logp * self.step_ends(tokens, mask)).sum(1).exp()

    def values(self, tokens, mask):
        """(B, T): the estimate *before* each token, from the hidden state to its left; 0 outside."""
        value = self.head(self.trunk(tokens[:, :-1]))
        return F.pad(value, (1, 0)) * mask
