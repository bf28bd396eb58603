"""What `train_sft.py --pack` is worth: seconds of a step's gradient, and pads, with rows packed and not.

    python bench/packing.py           half a CPU-minute; writes bench/results/packing.csv
    python bench/packing.py FILE      default: ../shared/data/gsm8k_train.jsonl

32 demonstrations a step, on a new Llama of 2 layers, one thread. The two take turns on the same steps and
must give the same loss. CPU seconds of the process, medians over 6 steps; pads: their share of all tokens.
"""

import csv
import os
import statistics
import sys

import torch
from kv_cache import ROOT, clock

import train_sft
from nanorlhf.data import microbatches, pack
from nanorlhf.hub.formats import read_rows
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.tokenizer import Tokenizer

FILE = os.path.join(ROOT, "..", "shared", "data", "gsm8k_train.jsonl")
STEPS, BATCH, CONTEXT = 6, 32, 512


def main(path=FILE):
    if not os.path.exists(path):
        print(f"skipped: {path} is not there (GSM8K, train.jsonl); give it as an argument")
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = read_rows(path, "demos")[: (STEPS + 1) * BATCH]
    tok = Tokenizer.train_bpe([r[key] for r in rows for key in ("prompt", "response")], 1000)
    model = GPT(GPTConfig.llama(tok.vocab_size, n_layer=2, d_model=128, max_len=CONTEXT))
    data, table = train_sft.encode_demonstrations(rows, tok, CONTEXT), []
    for budget in (1024, 4096, 0):
        seconds, pads = {False: [], True: []}, {False: [], True: []}
        for i in range(0, len(data) - BATCH + 1, BATCH):
            tokens, mask = train_sft.pad_demonstrations(data[i : i + BATCH], tok, "cpu")
            lengths = torch.tensor([len(ids) for ids, _ in data[i : i + BATCH]])
            batch = dict(tokens=tokens, mask=mask, lengths=lengths, denom=mask.sum())
            losses = []
            for packed in (False, True):
                cfg = train_sft.Config(pack=packed, tokens_per_microbatch=budget)
                (loss, _), t = clock(train_sft.gradient, model, batch, cfg)
                used = pack(tokens, mask, lengths)[2] if packed else lengths
                padded = sum(len(mb) * int(used[mb].max()) for mb in microbatches(used, budget))
                if i:  # the first round warms up
                    seconds[packed].append(t)
                    pads[packed].append(1 - int(lengths.sum()) / padded)
                losses.append(loss)
            assert abs(losses[0] - losses[1]) < 1e-4, losses
        plain, packed = (statistics.median(seconds[x]) for x in (False, True))
        ratios = [a / b for a, b in zip(*seconds.values())]
        table.append({"tokens_per_microbatch": budget, "seconds": plain, "seconds_packed": packed,
                      "speedup": plain / packed, "lowest": min(ratios), "highest": max(ratios),
                      "pads": statistics.mean(pads[False]), "pads_packed": statistics.mean(pads[True])})
        print("  ".join(f"{name} {x:.3g}" for name, x in table[-1].items()), flush=True)
    with open(os.path.join(ROOT, "bench", "results", "packing.csv"), "w", newline="") as f:
        writer = csv.DictWriter(f, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" for k, v in row.items()} for row in table)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    main(*sys.argv[1:])
