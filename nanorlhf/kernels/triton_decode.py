"""Attention of one new token per row to its row's own past, on a GPU.

Decoding reads the whole cache once per token and computes next to nothing, so that its time is the bytes it
reads. A row reads its own positions 0 … pos and no more, while a masked attention reads as many for every row
as the longest has. One program serves all query heads that share a key head. Where rows × key heads are too
few to keep the GPU busy, each row's past is cut into splits, one program each, and their parts are merged as
in the online softmax (arXiv 1805.02867; split over the length: Flash-Decoding). The kernel also writes the
new key and value into the cache.
"""

import torch
import triton
import triton.language as tl

from nanorlhf.kernels.triton_backend import UPCAST, _processors

BLOCK_T = 64  # positions of a tile, at most
TILE_BYTES = 1 << 14  # keys of a tile; three stages of keys and values then fit the 99 KiB of a GeForce
PROGRAMS = 4  # per processor: with fewer, too few bytes are on their way at a time
MAX_SPLITS = 32


@triton.jit
def decode(
    q, k, v, cache_k, cache_v, pos, out, sums, stats,
    scale, stride_b, stride_h,
    KV: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A program per row and key head, and per split of the row's past.

    q, out (B, KV·GROUP, HD), k, v (B, KV, HD). A single split writes `out`. Of several, each leaves its
    Σ exp(score − m)·value in sums (B, KV·GROUP, SPLITS, HD), and its maximum score m and Σ exp(score − m) in
    stats (B, KV·GROUP, SPLITS, 2).
    """
    row = tl.program_id(0)  # b·KV + key head
    split = tl.program_id(1)
    b = row // KV
    g = tl.arange(0, BLOCK_G)  # query heads of this key head
    d = tl.arange(0, BLOCK_D)  # channels
    heads = row * GROUP + g
    inside = (g < GROUP)[:, None] & (d < HD)[None, :]
    at = heads.to(tl.int64)[:, None] * HD + d[None, :]
    query = tl.load(q + at, mask=inside, other=0.0)
    new_k = tl.load(k + row * HD + d, mask=d < HD, other=0.0)
    new_v = tl.load(v + row * HD + d, mask=d < HD, other=0.0)
    last = tl.load(pos + b).to(tl.int32)
    past = b.to(tl.int64) * stride_b + (row % KV).to(tl.int64) * stride_h + d

    # Split 0 starts with the new token, the other splits start empty
    first = split == 0
    nothing = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    products = query.to(tl.float32) * new_k.to(tl.float32)[None, :]
    score = tl.sum(products, 1) * scale
    m = tl.where(first, score, -float("inf"))
    s = tl.where(first, 1.0, tl.zeros((BLOCK_G,), dtype=tl.float32))
    o = tl.where(first, new_v.to(tl.float32)[None, :], nothing)
    if first:  # no program of this launch reads the new position from the cache
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
        place = past[None, :] + t[:, None] * HD
        keys = tl.load(cache_k + place, mask=there, other=0.0)
        values = tl.load(cache_v + place, mask=there, other=0.0)
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
        result = o / s[:, None]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    else:
        part = heads.to(tl.int64) * SPLITS + split
        tl.store(sums + part[:, None] * HD + d[None, :], o, mask=inside)
        tl.store(stats + 2 * part, m, mask=g < GROUP)
        tl.store(stats + 2 * part + 1, s, mask=g < GROUP)


@triton.jit
def decode_merge(sums, stats, out, HD: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """The splits of one query head of one row → out. Split 0 is never empty: the maximum is finite."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    part = head * SPLITS + tl.arange(0, SPLITS)
    m = tl.load(stats + 2 * part)
    factor = tl.exp(m - tl.max(m, 0))
    s = tl.load(stats + 2 * part + 1)
    total = tl.sum(factor * s, 0)
    at = part[:, None] * HD + d[None, :]
    o = tl.load(sums + at, mask=(d < HD)[None, :], other=0.0)
    result = tl.sum(factor[:, None] * o, 0) / total
    tl.store(out + head * HD + d, result.to(out.dtype.element_ty), mask=d < HD)


def _splits(programs, live, device):
    """Into how many parts each row's past is cut: a power of two, none of them shorter than a tile."""
    wanted = PROGRAMS * _processors(device)
    splits = 1
    while programs * splits < wanted and 2 * splits * BLOCK_T <= live and splits < MAX_SPLITS:
        splits *= 2
    return splits


def _tile(block_d, itemsize):
    """Positions of a tile: wide heads and fp32 take fewer. tl.dot needs at least 16."""
    return max(16, min(BLOCK_T, TILE_BYTES // (block_d * itemsize)))


def decode_attention(q, k, v, cache_k, cache_v, pos, live):
    """`kernels.decode_attention`."""
    B, H, hd = q.shape
    KV = k.shape[1]
    q = q.contiguous()
    k = k.contiguous()
    v = v.contiguous()
    out = torch.empty_like(q)
    group = H // KV
    block_g = max(16, triton.next_power_of_2(group))  # 16: tl.dot needs as many
    block_d = max(16, triton.next_power_of_2(hd))
    block_t = _tile(block_d, q.element_size())
    splits = _splits(B * KV, live, q.device)
    sums = stats = out  # not used
    if splits > 1:
        sums = q.new_empty((B, H, splits, hd), dtype=torch.float32)
        stats = q.new_empty((B, H, splits, 2), dtype=torch.float32)
    with torch.cuda.device_of(out):
        decode[B * KV, splits](
            q, k, v, cache_k, cache_v, pos, out, sums, stats,
            hd**-0.5, cache_k.stride(0), cache_k.stride(1),
            KV=KV, GROUP=group, HD=hd, BLOCK_G=block_g, BLOCK_D=block_d,
            BLOCK_T=block_t, SPLITS=splits, num_warps=4, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            decode_merge[(B * H,)](
                sums, stats, out, HD=hd, BLOCK_D=block_d, SPLITS=splits, num_warps=1
            )
    return out
