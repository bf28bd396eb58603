"""The hand-written GPT: GPT-2, Llama, Qwen or Pythia by configuration, with a KV cache and a scalar head.

    tokens (B, T) → embedding → n_layer × [x + attention(norm(x)); x + mlp(norm(x))] → norm → hidden (B, T, D)

The model returns *hidden states*. Log-probs come from `GPT.logprobs`, which sends only the positions that are
asked for through the unembedding (`nanorlhf.kernels.linear_logprob`), so that training never stores B×T×V
logits.

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
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanorlhf.errors import require
from nanorlhf.kernels import decode_attention, linear_kl, linear_logprob
from nanorlhf.kernels.torch_backend import tiled_logits, widen

SHORT = 128  # tokens of a row: up to here a CPU's attention is faster in fp32 than in bf16
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
    rope_share: float = 1.0  # share of a head's channels that rotates (Pythia: a quarter)
    rope_scaling: tuple = ()  # Llama 3.1: (factor, low_freq_factor, high_freq_factor, original max_len)
    qk_norm: bool = False  # norms of each head's queries and keys (Qwen3)
    mlp: str = "gelu"  # gelu (tanh form, as GPT-2) | gelu_exact (Pythia) | swiglu
    parallel: bool = False  # x + attention + mlp of the same x (Pythia)
    qkv_bias: bool = True  # biases on the linear layers (a LayerNorm has one, an RMSNorm has none)
    o_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True  # the unembedding is the embedding

    def __post_init__(self):
        if self.n_kv_head == 0:
            self.n_kv_head = self.n_head
        kv_fits = self.n_head % self.n_kv_head == 0
        require(kv_fits, f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")
        if self.head_dim == 0:
            head_fits = self.d_model % self.n_head == 0
            require(head_fits, f"n_head={self.n_head} must divide d_model={self.d_model}")
            self.head_dim = self.d_model // self.n_head
        if self.d_ff == 0:
            self.d_ff = 4 * self.d_model
            if self.mlp == "swiglu":
                self.d_ff = 16 * math.ceil(8 * self.d_model / 3 / 16)
        if self.pos == "rope":  # channels rotate in pairs
            rotating = f"{self.head_dim} of which {self.rope_dim} rotate"
            require(self.rope_dim % 2 == 0, f"rotary positions need an even head_dim, got {rotating}")

    @property
    def rope_dim(self):
        """Channels of a head that rotate; the others carry no position."""
        return int(self.head_dim * self.rope_share)

    @classmethod
    def gpt2(cls, vocab_size, **settings):
        return cls(vocab_size, **settings)

    @classmethod
    def llama(cls, vocab_size, **settings):
        no_bias = dict(qkv_bias=False, o_bias=False, mlp_bias=False)
        llama = dict(norm="rms", pos="rope", mlp="swiglu")
        return cls(vocab_size, **llama | no_bias | settings)


class Linear(nn.Linear):
    """Weights stay in their own (master) precision and are cast to the activations' dtype at use.

    Inside `kernels.bf16.cast_once` they have been cast before.
    """

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        bias = self.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        return F.linear(x, weight, bias)


class Norm(nn.Module):
    """LayerNorm (mean and variance) or RMSNorm (root mean square, no bias), computed in at least fp32."""

    def __init__(self, cfg, width=None):
        super().__init__()
        width = width or cfg.d_model
        self.eps = cfg.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = None
        if cfg.norm == "layer":
            self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x, dtype=None):
        """x (..., D) → the same shape, in x's dtype or in another one."""
        y = widen(x)
        weight = self.weight.to(y.dtype)
        if self.bias is not None:
            bias = self.bias.to(y.dtype)
            y = F.layer_norm(y, y.shape[-1:], weight, bias, self.eps)
        else:
            mean_square = y.pow(2).mean(-1, keepdim=True)
            y = y * torch.rsqrt(mean_square + self.eps) * weight
        return y.to(dtype or x.dtype)


@cache  # none is dropped: CUDA graphs hold their addresses (kernels/slots.py)
def rope_table(dim, rows, theta, device, scaling=()):
    """(rows, dim/2) cosines and sines, from position 0 on. No buffer: `model.bfloat16()` must not round them.

    scaling (factor, low, high, original): channels that turn less than `low` times within the original
    context turn `factor` times slower, those that turn more than `high` times stay as they are, and the speed
    of those between is interpolated.
    """
    # In fp32, as where the models were trained: at position 10,000 the last bit is 1e-3 of the angle
    channel = torch.arange(0, dim, 2, dtype=torch.float32)
    freq = 1.0 / theta ** (channel / dim)
    if scaling:
        factor, low, high, original = scaling
        turns = original * freq / (2 * math.pi)
        keep = (turns - low) / (high - low)
        keep = keep.clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / factor
    position = torch.arange(rows, dtype=torch.float32)
    angle = position[:, None] * freq
    cos = angle.cos().to(device)
    sin = angle.sin().to(device)
    return cos, sin


def rotate(x, cos, sin):
    """Rotary positions for x (B, H, T, hd); cos, sin (B or 1, 1, T, r/2). Channels i and i + r/2 are a pair.

    >>> x = torch.tensor([1.0, 0.0, 5.0]).view(1, 1, 1, 3)  # r = 2: one pair, and a channel that stays
    >>> cos, sin = torch.tensor([0.0]), torch.tensor([1.0])  # a quarter turn
    >>> rotate(x, cos, sin).flatten()
    tensor([0., 1., 5.])
    """
    half = cos.shape[-1]
    wide = widen(x)
    a = wide[..., :half]
    b = wide[..., half : 2 * half]
    rest = wide[..., 2 * half :]
    new_a = a * cos - b * sin
    new_b = b * cos + a * sin
    rotated = torch.cat((new_a, new_b, rest), dim=-1)
    return rotated.to(x.dtype)


class KVCache:
    """Keys and values of every layer, preallocated: (n_layer, 2, B, n_kv_head, max_len, head_dim)."""

    def __init__(self, cfg, batch, max_len, device, dtype):
        shape = (cfg.n_layer, 2, batch, cfg.n_kv_head, max_len, cfg.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)

    def fill(self, to, source, rows, live):
        """Copy the first `live` positions of rows `rows` of `source`, a cache (or this one), to rows `to`."""
        copied = source.kv[:, :, rows, :, :live]
        self.kv[:, :, to, :, :live] = copied

    def first(self, batch):
        """The first `batch` rows as a cache that shares their memory."""
        part = copy.copy(self)
        part.kv = self.kv[:, :, :batch]
        return part

    def keep(self, rows, live):
        """Drop all rows but these, given in ascending order. Copied in place: nothing new is allocated."""
        for new, old in enumerate(rows.tolist()):
            if new != old:
                self.fill(new, self, old, live)
        self.kv = self.kv[:, :, : len(rows)]


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D = cfg.d_model
        q_width = cfg.n_head * cfg.head_dim
        kv_width = cfg.n_kv_head * cfg.head_dim
        self.q = Linear(D, q_width, bias=cfg.qkv_bias)
        self.k = Linear(D, kv_width, bias=cfg.qkv_bias)
        self.v = Linear(D, kv_width, bias=cfg.qkv_bias)
        self.o = Linear(q_width, D, bias=cfg.o_bias)
        self.q_norm = None
        self.k_norm = None
        if cfg.qk_norm:
            self.q_norm = Norm(cfg, cfg.head_dim)
            self.k_norm = Norm(cfg, cfg.head_dim)

    def split_heads(self, x):
        """(B, T, heads · hd) → (B, heads, T, hd)."""
        B, T, _ = x.shape
        heads = x.view(B, T, -1, self.cfg.head_dim)
        return heads.transpose(1, 2)

    def forward(self, x, rope, layer_cache, step, mask):
        """x (B, T, D) → (B, T, D).

        GPT.forward makes the other arguments; each may be None: rope (cos, sin) of each position, layer_cache
        (2, B, n_kv_head, max_len, hd) in prefill and decode, step (pos, live) in decode, mask (B, 1, T, T).
        """
        q = self.split_heads(self.q(x))  # (B, n_head, T, hd)
        k = self.split_heads(self.k(x))  # (B, n_kv_head, T, hd)
        v = self.split_heads(self.v(x))  # (B, n_kv_head, T, hd)
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if rope is not None:
            cos, sin = rope
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)
        T = x.shape[1]
        if step is not None:  # decode, T = 1: this token's k and v enter the cache at the row's own position
            q = q[:, :, 0]  # (B, n_head, hd)
            k = k[:, :, 0]  # (B, n_kv_head, hd)
            v = v[:, :, 0]
            pos, live = step
            y = decode_attention(q, k, v, layer_cache[0], layer_cache[1], pos, live)  # (B, n_head, hd)
            return self.o(y.flatten(1)[:, None])
        if layer_cache is not None:  # prefill: positions 0 … T-1 of every row enter the cache
            layer_cache[0, :, :, :T] = k
            layer_cache[1, :, :, :T] = v
        grouped = self.cfg.n_kv_head != self.cfg.n_head
        causal = mask is None
        if causal and T <= SHORT and q.device.type == "cpu":  # at 64 tokens in half the time of bf16
            q = widen(q)
            k = widen(k)
            v = widen(v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        y = y.transpose(1, 2).to(x.dtype)  # (B, T, n_head, hd)
        return self.o(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D = cfg.d_model
        self.up = Linear(D, cfg.d_ff, bias=cfg.mlp_bias)
        self.down = Linear(cfg.d_ff, D, bias=cfg.mlp_bias)
        self.gate = None
        if cfg.mlp == "swiglu":
            self.gate = Linear(D, cfg.d_ff, bias=cfg.mlp_bias)
        self.approximate = "tanh" if cfg.mlp == "gelu" else "none"

    def forward(self, x):
        up = self.up(x)  # (B, T, d_ff)
        if self.gate is not None:
            hidden = F.silu(self.gate(x)) * up
        else:
            hidden = F.gelu(up, approximate=self.approximate)
        return self.down(hidden)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = Norm(cfg)
        self.attn = Attention(cfg)
        self.norm2 = Norm(cfg)
        self.mlp = MLP(cfg)
        self.parallel = cfg.parallel

    def forward(self, x, dtype, rope, layer_cache, step, mask):
        """x (B, T, D), the residual stream → (B, T, D). The branches compute in `dtype`, the sums are fp32.

        In bf16 a sum of SmolLM2's stream, where some channels reach thousands, would lose what a branch adds.
        """
        normed = self.norm1(x, dtype)
        attended = x + self.attn(normed, rope, layer_cache, step, mask)  # detail 7: no dropout
        mlp_input = x if self.parallel else attended
        return attended + self.mlp(self.norm2(mlp_input, dtype))


def document_begins(doc):
    """doc (B, T), the number of each token's document → (B, T) bool, True at each document's first token.

    >>> document_begins(torch.tensor([[5, 5, 7]]))
    tensor([[ True, False,  True]])
    """
    changes = doc[:, 1:] != doc[:, :-1]
    return F.pad(changes, (1, 0), value=True)


def document_mask(start, dtype):
    """start (B, T), where each token's document begins → mask (B, 1, T, T) to be added to attention scores.

    0 where query t may see key s, which is in its document and not to its right; else −∞. One mask of numbers
    serves all layers: attention would turn a mask of bools into numbers in each of them.
    """
    same = start[:, :, None] == start[:, None]  # (B, T, T)
    seen = same.tril()[:, None]  # (B, 1, T, T)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -torch.inf)


class GPT(nn.Module):
    """A decoder-only transformer. Right padding only: a pad can then never touch a real token."""

    PASSES = ("logprobs",)  # methods, besides forward, that need the weights of all processes (run/dist.py)

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        V = cfg.vocab_size
        D = cfg.d_model
        self.compute_dtype = None  # dtype of the activations; None: that of the weights
        self.recompute = False  # --save_memory
        self.n_ids = V  # ids that exist: published models pad their matrices beyond them
        self.stop_ids = ()  # ids that end a response besides the tokenizer's EOS (chat models have several)
        self.source = None  # what hub.load keeps of a folder for hub.save
        self.wte = nn.Embedding(V, D)
        self.wpe = None
        if cfg.pos == "learned":
            self.wpe = nn.Embedding(cfg.max_len, D)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = Norm(cfg)
        self.lm_head = None
        if not cfg.tied:
            self.lm_head = Linear(D, V, bias=False)
        # Every matrix starts at N(0, 1/√fan_in), whatever the width (0.02 suits GPT-2's 768 and is far too
        # small for 64); the embedding is the unembedding, so D is its fan-in too. Residual outputs start
        # smaller, so that depth does not add variance (GPT-2).
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = p.shape[1] ** -0.5
                if name.endswith(("attn.o.weight", "mlp.down.weight")):
                    std *= (2 * cfg.n_layer) ** -0.5
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def unembedding(self):
        """The (n_ids, D) matrix from hidden states to logits, in the dtype of the activations.

        Only the first n_ids rows: published models pad the vocabulary, and padding ids must never be sampled.
        Only CUDA multiplies bf16 into fp32. Elsewhere the weight itself is read: a copy in bf16 would be
        widened again, tile by tile, and the gradient would be rounded.
        """
        head = self.lm_head or self.wte
        weight = head.weight
        if self.n_ids < len(weight):
            weight = weight[: self.n_ids]
        if self.device.type != "cuda" and self.dtype == torch.bfloat16:
            return weight
        return weight.to(self.dtype)

    @property
    def dtype(self):
        """The dtype of the activations."""
        return self.compute_dtype or self.wte.weight.dtype

    @property
    def trunk(self):
        """Itself: `model.trunk` is the GPT of a GPT as of a ScalarModel."""
        return self

    @property
    def device(self):
        mesh = getattr(self.wte.weight, "device_mesh", None)
        if mesh:  # --shard: with --save_memory the weight itself lies on the CPU
            return torch.device(mesh.device_type)
        return self.wte.weight.device

    def new_cache(self, batch, max_len):
        return KVCache(self.cfg, batch, max_len, self.device, self.dtype)

    def forward(self, tokens, cache=None, pos=None, live=None, doc=None):
        """tokens (B, T) int64 → hidden states (B, T, D), after the last norm.

        Training and scoring: tokens alone. Prefill: with a cache, which then holds positions 0 … T-1. Decode:
        with a cache, T = 1 and pos (B,), the position of each row's token; `live` is a number above them all
        (without it the host asks for the largest, and a GPU has to wait).

        doc (B, T) int64, in training: rows hold several documents, one after the other (`data.pack`). A new
        one begins where the number changes; it sees nothing to its left, and its positions start at 0.
        Raises UserError past `max_len`: rotary positions would extrapolate in silence.
        """
        cfg = self.cfg
        T = tokens.shape[1]
        require(T <= cfg.max_len, f"a sequence of {T} tokens exceeds the model's context of {cfg.max_len}")
        place = torch.arange(T, device=tokens.device)[None]  # (1, T)
        step = None
        if pos is not None:  # decode
            place = pos[:, None]  # (B, 1)
            step = (pos, live or int(pos.max()) + 1)
        if doc is not None:
            begins = place * document_begins(doc)  # (B, T)
            start = begins.cummax(1).values  # (B, T): where each token's document begins
            place = place - start

        x = self.wte(tokens)  # (B, T, D)
        if self.wpe is not None:
            x = x + self.wpe(place)
        dtype = self.dtype
        x = widen(x.to(dtype))  # the residual stream is fp32 also where the blocks compute in bf16
        rope = None
        if cfg.pos == "rope":
            end = T if cache is None else cache.kv.shape[-2]  # all positions are below it
            rows = 1 << max(8, end.bit_length())  # a power of two, so that few tables are made; not max_len,
            # which a config.json may say is 10 million, of which a run of 100 tokens needs none
            cos, sin = rope_table(cfg.rope_dim, rows, cfg.rope_theta, tokens.device, cfg.rope_scaling)
            rope = (cos[place][:, None], sin[place][:, None])  # (1 or B, 1, T, rope_dim/2) each
        mask = None if doc is None else document_mask(start, dtype)  # None: causal

        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.kv[i]
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, dtype, rope, layer_cache, step, mask,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                x = block(x, dtype, rope, layer_cache, step, mask)
        return self.norm(x, dtype)

    def head_logits(self, hidden, weight=None):
        """hidden (..., D) → fp32 logits (..., V): bf16 operands are widened, sums never rounded back.

        weight: the unembedding, for a caller that has it already.
        """
        if weight is None:
            weight = self.unembedding
        half = hidden.dtype.itemsize == 2
        if MM_FP32 and hidden.is_cuda and hidden.dim() == 2 and half:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # without a widened copy of the weight
        sampling = hidden.dim() == 2 and not torch.is_grad_enabled()
        if sampling and hidden.device.type == "cpu":
            return tiled_logits(hidden, weight)
        return F.linear(widen(hidden), widen(weight))

    def logits(self, tokens):
        """tokens (B, T) → fp32 logits (B, T, V). For evaluation and tests: training never builds them."""
        return self.head_logits(self(tokens))

    def hidden_before(self, tokens, mask, doc=None):
        """tokens, mask (B, T) bool → the hidden states (n, D) that predict the n tokens of the mask.

        ValueError where the mask holds the first token of a row, or of a document: nothing stands before it.
        On a GPU nobody looks, because the host would wait in every micro-batch until all its work is done.
        """
        begins = document_begins(torch.zeros_like(tokens) if doc is None else doc)
        if not mask.is_cuda and (mask & begins).any():
            raise ValueError(
                "mask[:, 0], and the mask where a document begins, must be 0: "
                "a first token has no distribution to be scored under"
            )
        doc = None if doc is None else doc[:, :-1]
        hidden = self(tokens[:, :-1], doc=doc)  # hidden[t-1] predicts token t: the one shift in the code base
        return hidden[mask[:, 1:]]

    def logprobs(self, tokens, mask, temperature=1.0, loss=None, doc=None, kl_to=None):
        """→ logp, entropy (B, T): log π(tokens[b,t] | tokens[b,:t]), and the entropy of that distribution.

        Both are indexed by the token they describe and 0 where mask is 0; masked positions never enter the
        head. The mask must be 0 at the first token of a row, and of a document (doc, see `forward`), as
        nothing stands before it to predict it from (ValueError otherwise).

        With `loss`, in one pass → total, stats, logp, entropy, where only `total` is differentiable, once.
        The tokens are scored in chunks, and loss(logp, entropy, chunk) is called for each: chunk (B, T) bool
        marks its tokens, and logp and entropy (B, T) are 0 outside of it. It returns a scalar and stats, a
        dict of scalars. The loss must be a sum over tokens, so that a sum over `chunk` is the chunk's part:

            def loss(logp, entropy, chunk):
                return -(logp * chunk).sum() / denom, {"entropy": (entropy * chunk).sum() / denom}

        total is the sum over the chunks; stats {name: (chunks,)} leaves sum or maximum to the caller.

        With `kl_to`, another GPT of this vocabulary, one more value stands at the end: kl (B, T), the exact
        KL(this‖other) over the vocabulary where each token was predicted. It is differentiable in this
        model's weights, and it comes from the hidden states of both, so that no logits are stored.
        """
        mask = mask.bool()
        before = self.hidden_before(tokens, mask, doc)  # (n, D)
        row, column = mask.nonzero(as_tuple=True)  # (n,) each: the tokens to be scored
        targets = tokens[row, column]  # (n,)

        def scatter(values, part=slice(None)):
            """(n,) values of the scored tokens, or of some of them → (B, T), 0 elsewhere."""
            zeros = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
            return zeros.index_put((row[part], column[part]), values)

        kl = []
        if kl_to is not None:
            with torch.no_grad():
                other = kl_to.hidden_before(tokens, mask, doc)  # (n, D')
            exact = linear_kl(before, self.unembedding, other, kl_to.unembedding, temperature)
            kl = [scatter(exact)]

        if loss is None:
            logp, entropy = linear_logprob(before, self.unembedding, targets, temperature)
            return scatter(logp), scatter(entropy), *kl

        def loss_of_chunk(logp, entropy, part):
            chunk = scatter(torch.ones_like(logp, dtype=torch.bool), part)
            return loss(scatter(logp, part), scatter(entropy, part), chunk)

        total, stats, logp, entropy = linear_logprob(
            before, self.unembedding, targets, temperature, loss=loss_of_chunk
        )
        return total, stats, scatter(logp), scatter(entropy), *kl


class ScalarModel(nn.Module):
    """A GPT trunk with one number per position: a reward model, or PPO's critic.

    The head starts at N(0, 1/√(D+1)) (detail 11 of N+). `reward_bias` is added to every output; train_rm sets
    it so that reference responses score 0 on average (detail 15 of N+). `step_ids`, the tokens that end a
    step, belongs to process reward models and is None elsewhere.
    """

    PASSES = ("rewards", "values", "logits", "process_rewards")

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        D = trunk.cfg.d_model
        self.score = Linear(D, 1, bias=False)
        std = 1 / math.sqrt(D + 1)
        nn.init.normal_(self.score.weight, std=std)  # detail 11
        self.register_buffer("reward_bias", torch.zeros((), dtype=torch.float32))
        self.step_ids = None

    @property
    def cfg(self):
        return self.trunk.cfg

    @property
    def device(self):
        return self.trunk.device

    def head(self, hidden):
        """hidden (..., D) → (...,), in fp32 also where the trunk computes in bf16."""
        score = self.score(widen(hidden))  # (..., 1)
        return score.squeeze(-1) + self.reward_bias

    def logits(self, tokens):
        """tokens (B, T) → (B, T): the number at every position."""
        return self.head(self.trunk(tokens))

    def rewards(self, tokens, lengths):
        """tokens (B, T), lengths (B,) → (B,): read at each row's last token (detail 12 of N+)."""
        hidden = self.trunk(tokens)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.head(hidden[rows, lengths - 1])  # detail 12

    def values(self, tokens, mask):
        """(B, T): the estimate *before* each token, from the hidden state to its left; 0 outside."""
        value = self.head(self.trunk(tokens[:, :-1]))
        return F.pad(value, (1, 0)) * mask

    # Process reward models: train_prm teaches the number at a step's last token to be the logit of "right".

    def scores(self, tokens, lengths, mask):
        """tokens, mask (B, T), lengths (B,) → (B,): by steps from a process reward model, else `rewards`."""
        if self.step_ids is None:
            return self.rewards(tokens, lengths)
        return self.process_rewards(tokens, mask)

    def process_rewards(self, tokens, mask):
        """tokens, mask (B, T) → (B,): the product of P(step is right) over the steps (arXiv 2305.20050)."""
        logp = F.logsigmoid(self.logits(tokens))
        per_step = logp * self.step_ends(tokens, mask)  # (B, T)
        return per_step.sum(1).exp()

    def step_ends(self, tokens, mask):
        """tokens, mask of the response (B, T) → (B, T) bool: tokens that end a step; the last always does."""
        goes_on = F.pad(mask[:, 1:], (0, 1))
        last = mask & ~goes_on
        step_ids = torch.tensor(self.step_ids, device=tokens.device)
        return last | (mask & torch.isin(tokens, step_ids))
