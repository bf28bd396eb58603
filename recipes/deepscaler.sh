#!/usr/bin/env bash
# DeepScaleR: GRPO on DeepSeek-R1-Distill-Qwen-1.5B, the response length 8K → 16K → 24K.
#
#   PROMPTS=4 bash recipes/deepscaler.sh        a small batch; further flags go to every stage
#
# Needs    models/DeepSeek-R1-Distill-Qwen-1.5B, data/deepscaler.jsonl (problem, answer; 40,000 of them), and
#          pip install math-verify.
# Reports  AIME 2024 28.8 → 43.1, MATH 82.8 → 87.8; 3,800 A100-hours.
#
# Memory, computed by --dry_run and not measured: one H200 of 139 GiB, prompts of 100 tokens on average (300 at
# most), responses as long as they may be.
#   PROMPTS      8K        16K        24K
#   128        89 GiB     89 GiB    110 GiB     the published batch
#   4          61 GiB     86 GiB    110 GiB
#
# Memory does not limit the batch: responses wait for one of the 237, 121 and 81 slots that fit into half of the
# free memory. Time limits it. The number of steps is the published one, so that fewer prompts also see less data.
# With --save_memory the last stage takes less than 89 GiB, and every stage fits an A100 of 80 GB with fewer slots.
#
# Differs  15% of the prompts are held out. `math_answer` compares formulas with math-verify, their checker with
#          rules of its own and sympy.
set -e
MODEL=${MODEL:-models/DeepSeek-R1-Distill-Qwen-1.5B}
PROMPTS=${PROMPTS:-128}
FLAGS="--recipe deepscaler --temperature 0.6 --lr 1e-6 --epochs 1 --minibatches 2"
FLAGS="$FLAGS --lora_rank 0 --dtype bfloat16"
FLAGS="$FLAGS --data data/deepscaler.jsonl --reward nanorlhf/answers.py:math_answer --eval_prompts 16"

echo "deepscaler, after DeepScaleR (Luo et al. 2025): every stage with its flags"
set -x

python train_grpo.py --init "$MODEL" --out runs/deepscaler-8k $FLAGS \
    --prompts_per_step $PROMPTS --group_size 8 --max_new_tokens 8192 --steps 1040 "$@"

python train_grpo.py --init runs/deepscaler-8k/model --out runs/deepscaler-16k $FLAGS \
    --prompts_per_step $PROMPTS --group_size 16 --max_new_tokens 16384 --steps 480 "$@"

python train_grpo.py --init runs/deepscaler-16k/model --out runs/deepscaler-24k $FLAGS \
    --prompts_per_step $PROMPTS --group_size 16 --max_new_tokens 24576 --steps 230 "$@"
