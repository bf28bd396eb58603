#!/usr/bin/env bash
# Every trainer on the weights of SmolLM2-135M-Instruct, a few minutes each, on a CPU.
#
#   make real-all                                    after make real, whose model is the teacher of distill
#   bash recipes/smollm2_all.sh dpo rm               these two alone
#   GSM8K=gsm8k.jsonl HH=hh.jsonl.gz SEED=1 bash recipes/smollm2_all.sh
#
# Needs    GSM8K: question + answer (default data/gsm8k_train.jsonl); HH: chosen + rejected (data/hh_harmless.jsonl.gz).
#          docs/data.md has the formats; short rows are taken. About 5 GB of memory for grpo_full, which trains all
#          weights (weights, gradients, moments, activations added up; not measured).
#
# Stage      trains                                                    ends with, before and after, ± standard error
# grpo_full  all weights by GRPO on the sums of make real              right answers, sampled and greedy, held-out sums
# sft        adapters on 240 problems of GSM8K                         loss on 64 others, nats a token
# dpo        adapters on 240 pairs of HH                               160 other pairs in order, by β log π/π_ref
# rm         a reward model on the same pairs                          the same pairs in order, by its score
# ppo        adapters of policy and critic, on the sums                as grpo_full
# distill    adapters, towards the model of make real, on the sums     as grpo_full
#
# Each stage leaves RUN/all/STAGE (the run) and RUN/all/STAGE.json; the table is RUN/all/report.md. Measured figures are
# in docs/real-weights.md. On a GPU add --device cuda --dtype bfloat16 to FLAGS (not measured).
set -e
SEED=${SEED:-0}
GSM8K=${GSM8K:-data/gsm8k_train.jsonl}
HH=${HH:-data/hh_harmless.jsonl.gz}
BASE=runs/real/SmolLM2-135M-Instruct
MODEL=${MODEL:-$BASE}
REAL=${RUN:-runs/real$([ "$SEED" = 0 ] || echo "-$SEED")}
RUN=$REAL/all
REWARD=nanorlhf/answers.py:last_number
LONGEST=16
HELDOUT=48
LORA="--lora_rank 16"
COMMON="--init $MODEL --seed $SEED --save_every 0 --overwrite"
SUMS="--data $RUN/train.jsonl --eval_data $RUN/heldout.jsonl --eval_prompts $HELDOUT --max_new_tokens $LONGEST"

fail() { echo "recipes/smollm2_all.sh: error: $1" >&2; exit 2; }
stage() { python -m recipes.smollm2.stage "$RUN" "$@"; }

measure() {  # STAGE MODEL [--ref TEACHER]: right answers on the held-out sums → STAGE.json
    python evaluate.py --probe --model "$2" --data "$RUN/heldout.jsonl" --prompts $HELDOUT --reward $REWARD \
        --n 8 --k 1,8 --max_new_tokens $LONGEST --seed "$SEED" --out "$RUN/$1.json" "${@:3}"
}

sums_before() {  # the base model on the sums, once for all stages
    [ -e "$RUN/sums_before.json" ] || measure sums_before "$MODEL"
}

pairs() {  # the preferences of dpo and rm
    python -m recipes.smollm2.short_rows "$HH" "$RUN/hh" 700 240 160
}

grpo_full() {
    sums_before
    stage grpo_full python train_grpo.py $COMMON $SUMS --reward $REWARD --lora_rank 0 --lr 2e-5 --kl none --ref none \
        --steps 12 --prompts_per_step 8 --group_size 8 --minibatches 4 --out "$RUN/grpo_full" $FLAGS
    measure grpo_full "$RUN/grpo_full/model"
}

sft() {
    python -m recipes.smollm2.short_rows "$GSM8K" "$RUN/gsm8k" 400 240 64
    stage sft python train_sft.py $COMMON $LORA --data "$RUN/gsm8k.jsonl" --eval_data "$RUN/gsm8k-heldout.jsonl" \
        --lr 2e-4 --steps 30 --batch_size 8 --eval_every 0 --out "$RUN/sft" $FLAGS
    python -m recipes.smollm2.sft_loss "$MODEL" "$RUN/sft/model" "$RUN/gsm8k-heldout.jsonl" "$RUN/sft.json"
}

dpo() {
    pairs
    stage dpo python train_dpo.py $COMMON $LORA --data "$RUN/hh.jsonl" --lr 1e-4 --beta 0.1 --steps 30 --batch_size 8 \
        --eval_prompts 8 --max_new_tokens 32 --eval_every 0 --out "$RUN/dpo" $FLAGS
    python evaluate.py --model "$RUN/dpo/model" --ref "$MODEL" --pairs "$RUN/hh-heldout.jsonl" --data "$RUN/hh.jsonl" \
        --prompts 2 --n 2 --k 1 --max_new_tokens 8 --out "$RUN/dpo.json"
}

rm_() {
    pairs
    stage rm python train_rm.py $COMMON $LORA --data "$RUN/hh.jsonl" --lr 1e-4 --steps 30 --batch_size 8 \
        --eval_every 0 --out "$RUN/rm" $FLAGS
    python evaluate.py --model "$MODEL" --rm "$RUN/rm/model" --pairs "$RUN/hh-heldout.jsonl" --data "$RUN/hh.jsonl" \
        --prompts 2 --n 2 --k 1 --max_new_tokens 8 --out "$RUN/rm.json"
}

ppo() {
    sums_before
    stage ppo python train_ppo.py $COMMON $SUMS $LORA --reward $REWARD --lr 4e-4 --critic_lr 4e-4 --beta 0 \
        --no_eos_score -1 --steps 16 --prompts_per_step 64 --minibatches 4 --out "$RUN/ppo" $FLAGS
    measure ppo "$RUN/ppo/model"
}

distill() {
    [ -e "$REAL/grpo/model" ] || fail "distill learns from $REAL/grpo/model, which is not there: run make real first"
    sums_before
    stage distill python train_distill.py $COMMON $SUMS $LORA --teacher "$REAL/grpo/model" --reward $REWARD --lr 4e-4 \
        --steps 12 --prompts_per_step 16 --group_size 4 --out "$RUN/distill" $FLAGS
    measure distill "$RUN/distill/model" --ref "$REAL/grpo/model"
}

STAGES=${*:-grpo_full sft dpo rm ppo distill}
for name in $STAGES; do
    case $name in
        sft) [ -e "$GSM8K" ] || fail "there is no $GSM8K: name a file of question + answer, GSM8K=..." ;;
        dpo|rm) [ -e "$HH" ] || fail "there is no $HH: name a file of chosen + rejected, HH=..." ;;
        grpo_full|ppo|distill) ;;
        *) fail "$name is no stage: grpo_full, sft, dpo, rm, ppo or distill" ;;
    esac
done
if [ "$MODEL" = "$BASE" ]; then bash recipes/smollm2/fetch.sh "$MODEL"; fi
mkdir -p "$RUN"
if [ "$(cat "$RUN/model" 2>/dev/null)" != "$MODEL" ]; then rm -f "$RUN"/*.json; fi  # figures of another model
echo "$MODEL" > "$RUN/model"
python -m recipes.smollm2.sums "$RUN" "$SEED"
for name in $STAGES; do
    echo "── $name"
    if [ "$name" = rm ]; then rm_; else $name; fi  # rm is a command of the shell
done
python -m recipes.smollm2.report_all "$RUN" "$SEED"
