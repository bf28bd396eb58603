#!/usr/bin/env bash
# DeepSeek-R1-Zero's recipe (arXiv 2501.12948) on GSM8K, from a base model, on one GPU.
#
#   SIZE=0.5B bash recipes/r1_zero_gsm8k.sh     or 1.5B; further flags go to the trainer
#
# Needs    models/Qwen2.5-$SIZE and data/gsm8k_train.jsonl (question, answer).
#
# Memory, computed by --dry_run and not measured: one A100 of 80 GB, prompts of 110 tokens on average (300 at most),
# 512 new tokens in every response.
#   0.5B         23 GiB
#   1.5B         56 GiB
#
# Rewards  1 for the right number, 1 for the form <think>…</think> <answer>…</answer>: the same weight, as published.
#          A base model finds the form only because the prompt describes it.
# Differs  R1-Zero samples 8,192 responses at once and splits them into 16 updates; here there are 512, and one
#          update. The learning rate is 1e-6 (theirs 3e-6, on 671B) and falls to 0 after 5 steps of warm-up. The
#          policy becomes the reference after every 400 updates, which a run of 198 never reaches. 15% of the problems
#          are held out.
set -e
SIZE=${SIZE:-0.5B}
MODEL=${MODEL:-models/Qwen2.5-$SIZE}
DATA=${DATA:-data/gsm8k_train.jsonl}
PROMPTS=${PROMPTS:-runs/gsm8k_r1_prompts.jsonl}

mkdir -p runs
python - "$DATA" "$PROMPTS" <<'PY'
import json, sys
template = ("A conversation between User and Assistant. The Assistant first thinks about the reasoning and then "
            "gives the answer, a number: <think> reasoning </think> <answer> answer </answer>.\n"
            "User: {}\nAssistant:")
with open(sys.argv[1], encoding="utf-8") as f, open(sys.argv[2], "w", encoding="utf-8") as out:
    for row in map(json.loads, f):
        answer = row["answer"].rpartition("####")[2].strip()
        out.write(json.dumps({"prompt": template.format(row["question"]), "answer": answer}) + "\n")
PY

echo "r1_zero_gsm8k, after DeepSeek-R1-Zero (arXiv 2501.12948): every stage with its flags"
set -x

python train_grpo.py --recipe r1_zero --data "$PROMPTS" --init "$MODEL" --out "runs/r1-zero-gsm8k-$SIZE" \
    --reward nanorlhf/answers.py:numeric_answer --reward nanorlhf/answers.py:answer_format \
    --prompts_per_step 32 --group_size 16 --max_new_tokens 512 --minibatches 1 --steps 198 --lr 1e-6 \
    --temperature 1 --eval_prompts 256 --tokens_per_microbatch 8192 \
    --lora_rank 0 --dtype bfloat16 "$@"
