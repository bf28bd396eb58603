"""What the KV cache is worth: `generate` against `generate.reference`, which recomputes every prefix.

    python bench/kv_cache.py        half a minute; writes bench/results/kv_cache.csv

The demo's model, 64 rows, one thread, 32 new tokens each, no row ever leaving (no EOS). The two take
turns with the same seeds and must return the same tokens and log-probs. CPU seconds of the process, medians
over the rounds.
"""

import csv
import os
import statistics
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from nanorlhf import generate  # noqa: E402
from nanorlhf.model import GPT, GPTConfig  # noqa: E402

ROUNDS, ROWS, NEW, VOCAB = 9, 64, 32, 543


def clock(fn, *args, **kw):
    start = time.process_time()
    result = fn(*args, **kw)
    return result, time.process_time() - start


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(VOCAB, n_layer=2, d_model=96, max_len=64))
    rows = []
    for prompt_len in (9, 16, 31):
        prompts = torch.randint(0, VOCAB, (ROWS, prompt_len)).tolist()
        times = {"cached": [], "uncached": []}
        for seed in range(ROUNDS + 1):
            a, t_a = clock(generate.generate, model, prompts, max_new_tokens=NEW, seed=seed)
            b, t_b = clock(generate.reference, model, prompts, max_new_tokens=NEW, seed=seed)
            same = (a.tokens == b.tokens).all(1)  # a draw on the edge may flip: 1 in 30,000
            assert same.float().mean() > 0.95 and (a.logp - b.logp)[same].abs().max() < 1e-5
            if seed:  # the first round warms up
                times["cached"].append(t_a)
                times["uncached"].append(t_b)
        cached, uncached = (statistics.median(t) for t in times.values())
        ratios = [u / c for c, u in zip(*times.values())]
        rows.append({"prompt_tokens": prompt_len, "new_tokens": NEW, "rows": ROWS, "cached_ms": 1e3 * cached,
                     "uncached_ms": 1e3 * uncached, "speedup": uncached / cached, "lowest": min(ratios),
                     "highest": max(ratios)})
        speed = f"{uncached / cached:.1f} × (rounds {min(ratios):.1f} to {max(ratios):.1f})"
        print(f"prompt {prompt_len:>2}: {1e3 * cached:.1f} ms cached, {1e3 * uncached:.1f} without: {speed}")
    out = os.path.join(ROOT, "bench", "results", "kv_cache.csv")
    with open(out, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    main()
