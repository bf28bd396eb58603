"""Attention of one new token per row to its row's own past, on a GPU.

Decoding reads the whole cache once per token and computes next to nothing, so what counts is bytes: a row
reads its own positions 0 … pos and no more, where a masked attention reads the longest row's for every row.
One program serves all query heads that share a key head. Where rows × key heads are too few to keep the GPU
busy, each row's past is dealt out to several programs, and their parts are merged as in the online softmax
(arXiv 1805.02867; split over the length: Flash-Decoding). The new key and value are written on the way.
"""

import torch
import triton
import triton.language as tl

from nanorlhf.kernels.triton_backend import UPCAST

BLOCK_T = 64  # positions of a tile, at most
TILE_BYTES = 1 << 14  # of keys in a tile: three stages of keys and values fit a GPU with 99 KiB for a program
PROGRAMS = 4  # per processor: with fewer, too few bytes are on their way at a time
MAX_SPLITS = 32


@triton.jit
def decode(q, k, v, cache_k, cache_v, pos, out, sums, stats, scale, stride_b, stride_h, KV: tl.constexpr,
           GROUP: tl.constexpr, HD: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_T: tl.constexpr, SPLITS: tl.constexpr):
    """q, out (B, KV·GROUP, HD), k, v (B, KV, HD). Of each split: sums (B, KV·GROUP, SPLITS, HD), the weighted
    values, and stats (B, KV·GROUP, SPLITS, 2), the maximum score m and Σ exp(score − m)."""
    row, split = tl.program_id(0), tl.program_id(1)  # row = b·KV + key head
    b = row // KV
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = row * GROUP + g
    inside = (g < GROUP)[:, None] & (d < HD)[None, :]
    at = heads.to(tl.int64)[:, None] * HD + d[None, :]
    query = tl.load(q + at, mask=inside, other=0.0)
    new_k = tl.load(k + row * HD + d, mask=d < HD, other=0.0)
    new_v = tl.load(v + row * HD + d, mask=d < HD, other=0.0)
    last = tl.load(pos + b).to(tl.int32)
    past = b.to(tl.int64) * stride_b + (row % KV).to(tl.int64) * stride_h + d

    # the new token is where split 0 starts from; the other splits start from nothing
    first = split == 0
    score = tl.sum(query.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
    m = tl.where(first, score, -float("inf"))
    s = tl.where(first, 1.0, tl.zeros((BLOCK_G,), dtype=tl.float32))
    o = tl.where(first, new_v.to(tl.float32)[None, :], tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32))
    if first:  # nobody reads this position in this launch
        tl.store(cache_k + past + last * HD, new_k, mask=d < HD)
        tl.store(cache_v + past + last * HD, new_v, mask=d < HD)
    if UPCAST:
        query = query.to(tl.float32)

    share = tl.cdiv(last, SPLITS * BLOCK_T) * BLOCK_T
    start = split * share
    stop = tl.minimum(start + share, last)
    for t0 in range(start, stop, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        there = (t < stop)[:, None] & (d < HD)[None, :]
        keys = tl.load(cache_k + past[None, :] + t[:, None] * HD, mask=there, other=0.0)
        values = tl.load(cache_v + past[None, :] + t[:, None] * HD, mask=there, other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        z = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        z = tl.where((t < stop)[None, :], z, -float("inf"))
        top = tl.maximum(m, tl.max(z, 1))
        p = tl.exp(z - top[:, None])
        factor = tl.exp(m - top)
        s = factor * s + tl.sum(p, 1)
        o = factor[:, None] * o + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        m = top
    if SPLITS == 1:
        tl.store(out + at, (o / s[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        part = heads.to(tl.int64) * SPLITS + split
        tl.store(sums + part[:, None] * HD + d[None, :], o, mask=inside)
        tl.store(stats + 2 * part, m, mask=g < GROUP)
        tl.store(stats + 2 * part + 1, s, mask=g < GROUP)


@triton.jit
def decode_merge(sums, stats, out, HD: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """The splits of one query head of one row → out. Split 0 is never empty, so the maximum is finite."""
    head = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    m = tl.load(stats + 2 * (head * SPLITS + i))
    factor = tl.exp(m - tl.max(m, 0))
    total = tl.sum(factor * tl.load(stats + 2 * (head * SPLITS + i) + 1), 0)
    at = (head * SPLITS + i)[:, None] * HD + d[None, :]
    o = tl.sum(factor[:, None] * tl.load(sums + at, mask=(d < HD)[None, :], other=0.0), 0) / total
    tl.store(out + head * HD + d, o.to(out.dtype.element_ty), mask=d < HD)


def _splits(programs, live, device):
    """Into how many parts each row's past is cut: a power of two, none of them less than a tile."""
    gpu = device.type == "cuda"
    wanted = PROGRAMS * (torch.cuda.get_device_properties(device).multi_processor_count if gpu else 4)
    splits = 1
    while programs * splits < wanted and 2 * splits * BLOCK_T <= live and splits < MAX_SPLITS:
        splits *= 2
    return splits


def _tile(block_d, itemsize):
    """Positions of a tile: wide heads and fp32 take fewer (tl.dot: 16 at least)."""
    return max(16, min(BLOCK_T, TILE_BYTES // (block_d * itemsize)))


def decode_attention(q, k, v, cache_k, cache_v, pos, live):
    (B, H, hd), kv = q.shape, k.shape[1]
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, block_d = torch.empty_like(q), max(16, triton.next_power_of_2(hd))
    splits = _splits(B * kv, live, q.device)
    sums = stats = out
    if splits > 1:
        sums = q.new_empty((B, H, splits, hd), dtype=torch.float32)
        stats = q.new_empty((B, H, splits, 2), dtype=torch.float32)
    group = dict(KV=kv, GROUP=H // kv, BLOCK_G=max(16, triton.next_power_of_2(H // kv)))  # 16: tl.dot's least
    with torch.cuda.device_of(out):
        decode[B * kv, splits](
            q, k, v, cache_k, cache_v, pos, out, sums, stats, hd**-0.5, cache_k.stride(0), cache_k.stride(1),
            HD=hd, BLOCK_D=block_d, BLOCK_T=_tile(block_d, q.element_size()), SPLITS=splits, num_warps=4,
            num_stages=3, **group,
        )  # fmt: skip
        if splits > 1:
            decode_merge[(B * H,)](sums, stats, out, HD=hd, BLOCK_D=block_d, SPLITS=splits, num_warps=1)
    return out
