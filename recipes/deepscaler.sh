#!/usr/bin/env bash
# DeepScaleR: GRPO on DeepSeek-R1-Distill-Qwen-1.5B, the response length 8K → 16K → 24K.
#
#   PROMPTS=128 bash recipes/deepscaler.sh      the published batch; further flags go to every stage
#
# Needs    models/DeepSeek-R1-Distill-Qwen-1.5B and data/deepscaler.jsonl (problem, answer; 40,000 of them).
# Reports  AIME 2024 28.8 → 43.1, MATH 82.8 → 87.8; 3,800 A100-hours.
#
# Computed by --dry_run for prompts of 100 tokens and responses as long as they may be, not measured; hours
# as on an A100 at 40% of its peak:
#   PROMPTS          8K                16K               24K
#   4            63 GiB,  36 h     88 GiB,  66 h    114 GiB,  59 h
#   128         467 GiB, 614 h   1738 GiB, 1631 h  2578 GiB, 1542 h
#
# All responses of a step are sampled at once, so the published 128 prompts want more memory than one GPU
# has. The default is what fits one H200 of 139 GiB at the last stage; the steps are as published, so that
# fewer prompts also see less data.
#
# Differs  15% of the prompts are held out; `exact_answer` compares texts, their checker compares formulas;
#          learning rate: 5 steps of warm-up, then linear to 0 within each stage, theirs is constant.
set -e
MODEL=${MODEL:-models/DeepSeek-R1-Distill-Qwen-1.5B}
PROMPTS=${PROMPTS:-4}
FLAGS="--recipe deepscaler --temperature 0.6 --lr 1e-6 --epochs 1 --minibatches 2 --dtype bfloat16"
FLAGS="$FLAGS --data data/deepscaler.jsonl --reward nanorlhf/tasks.py:exact_answer --eval_prompts 16"

python train_grpo.py --init "$MODEL" --out runs/deepscaler-8k $FLAGS \
    --prompts_per_step $PROMPTS --group_size 8 --max_new_tokens 8192 --steps 1040 "$@"

python train_grpo.py --init runs/deepscaler-8k/model --out runs/deepscaler-16k $FLAGS \
    --prompts_per_step $PROMPTS --group_size 16 --max_new_tokens 16384 --steps 480 "$@"

python train_grpo.py --init runs/deepscaler-16k/model --out runs/deepscaler-24k $FLAGS \
    --prompts_per_step $PROMPTS --group_size 16 --max_new_tokens 24576 --steps 230 "$@"
