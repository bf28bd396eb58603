"""A reward model from scratch on real preferences, HH-RLHF: does it beat the length of the response?

    python bench/hh_rm.py                       350 CPU-seconds; writes bench/results/hh_rm.csv
    python bench/hh_rm.py --data FILE           default: ../shared/data/hh_harmless_test.jsonl.gz
    python bench/hh_rm.py --seeds 0,1           other seeds than 0, 1, 2

The harmless part's 2,312 test pairs, of which 15% of the prompts are held out; two layers of width 128, a
byte-level BPE of 2,048 ranks, SFT on the chosen responses, then 120 steps on the pairs. All seeds of the
reward model start from the same SFT model.
"""

import os
import sys
import tempfile

from main_job import ROOT, last_row, run, show, write

FILE = os.path.join(ROOT, "..", "shared", "data", "hh_harmless_test.jsonl.gz")
MODEL = "--n_layer 2 --d_model 128 --max_len 384 --vocab_size 2048 --threads 1".split()
SFT = "--steps 250 --batch_size 16 --lr 3e-3".split()
RM = "--steps 120 --batch_size 32 --lr 3e-4 --threads 1".split()


def main():
    args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    data = args.get("--data", FILE)
    if not os.path.exists(data):
        print(f"skipped: {data} is not there (HH-RLHF, harmless-base/test.jsonl.gz); give it with --data")
        return
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        cpu_sft = run("train_sft.py", "--data", data, *MODEL, *SFT, "--out", f"{tmp}/sft")
        for seed in args.get("--seeds", "0,1,2").split(","):
            out = f"{tmp}/rm{seed}"
            flags = ["--data", data, "--init", f"{tmp}/sft/model", "--seed", seed, "--out", out]
            cpu = run("train_rm.py", *flags, *RM)
            acc, length = (last_row(out, f"eval/{name}")[1] for name in ("acc", "acc_len_only"))
            rows.append({"seed": int(seed), "acc": acc, "acc_len_only": length,
                         "cpu_seconds_sft": cpu_sft, "cpu_seconds_rm": cpu})  # fmt: skip
            write("hh_rm", rows)
    def margin(r):
        return r["acc"] - r["acc_len_only"]

    goals = {"held-out accuracy, above length alone by": (margin, "> 0", lambda v: v > 0)}
    show("python bench/hh_rm.py", rows, goals)


if __name__ == "__main__":
    main()
