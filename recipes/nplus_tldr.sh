#!/usr/bin/env bash
# "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031): TL;DR on Pythia, SFT → RM → PPO.
#
#   SIZE=1b bash recipes/nplus_tldr.sh          or 2.8b, 6.9b; further flags are handed on to every stage
#
# Needs    models/pythia-$SIZE-deduped (a Hugging Face folder), data/tldr_sft.jsonl (post, summary, title,
#          subreddit) and data/tldr_pairs.jsonl (OpenAI's comparisons: info, summaries, choice).
# Reports  reward model's accuracy .628 / .669 / .689; PPO preferred to the reference about 80% of the time
#          at 6.9B; at 1B it over-optimises.
#
# Computed by --dry_run for prompts of 370 tokens on average (512 at most), not measured; hours as
# on an A100 at 40% of its peak, memory as on one GPU: for PPO that is an H200, the cache of a whole step's
# responses being its largest part. PROMPTS=64 makes it smaller, and another batch than the published 512,
# as 256 and 128 are for the two larger sizes; the episodes stay 1,000,000.
#                 SFT              RM               PPO
#   1b         23 GiB, 0.5 h    22 GiB, 0.7 h    103 GiB,  44 h    all weights
#   2.8b       21 GiB, 1.0 h    20 GiB, 1.6 h    107 GiB, 103 h    adapters of rank 64
#   6.9b       40 GiB, 2.5 h    40 GiB, 4.0 h    123 GiB, 254 h    adapters of rank 64
#
# Differs  15% of the prompts are held out, so an epoch has 15% fewer steps; AdamW's ε is 1e-8 in SFT and RM;
#          their learning rate falls linearly to a tenth, not as a cosine; sampling stops at EOS. Prompts
#          that are too long are dropped, not cut. 2.8B and 6.9B are trained by adapters, of ten times the
#          learning rate: the paper trains all weights.
set -e
SIZE=${SIZE:-1b}
MODEL=${MODEL:-models/pythia-$SIZE-deduped}
RUN=runs/tldr-$SIZE
LORA="--lora_rank 64" LR=3e-5
case $SIZE in
    1b) LORA="--lora_rank 0" LR=3e-6 PROMPTS=${PROMPTS:-512} ;;
    2.8b) PROMPTS=${PROMPTS:-256} ;;
    *) PROMPTS=${PROMPTS:-128} ;;
esac

python train_sft.py --data data/tldr_sft.jsonl --init "$MODEL" --out "$RUN-sft" --loss_on_prompt \
    --steps 775 --batch_size 128 --lr $LR --weight_decay 0.01 --max_grad_norm 1e6 $LORA \
    --tokens_per_microbatch 4096 --dtype bfloat16 "$@"

python train_rm.py --data data/tldr_pairs.jsonl --init "$RUN-sft/model" --references data/tldr_sft.jsonl \
    --out "$RUN-rm" --steps 1233 --batch_size 64 --lr $LR --weight_decay 0.01 --max_grad_norm 1e6 $LORA \
    --tokens_per_microbatch 4096 --dtype bfloat16 "$@"

python train_ppo.py --data data/tldr_sft.jsonl --init "$RUN-sft/model" --rm "$RUN-rm/model" \
    --out "$RUN-ppo" --steps $((1000000 / PROMPTS)) --prompts_per_step $PROMPTS --max_new_tokens 53 \
    --temperature 0.7 --epochs 4 --minibatches 1 --lr $LR --critic_lr $LR --max_grad_norm 1e6 \
    --beta 0.05 --gamma 1 --lam 0.95 --clip 0.2 --value_clip 0.2 --eval_prompts 128 \
    --vf_coef 0.1 --no_eos_score -1 $LORA \
    --tokens_per_microbatch 2048 --dtype bfloat16 "$@"
