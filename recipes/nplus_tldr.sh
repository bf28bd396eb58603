#!/usr/bin/env bash
# "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031): TL;DR on Pythia, SFT → RM → PPO.
#
#   SIZE=1b bash recipes/nplus_tldr.sh          or 2.8b, 6.9b; further flags go to every stage
#
# Needs    models/pythia-$SIZE-deduped (a Hugging Face folder), data/tldr_sft.jsonl (post, summary, title,
#          subreddit) and data/tldr_pairs.jsonl (OpenAI's comparisons: info, summaries, choice).
# Reports  reward model's accuracy .628 / .669 / .689; PPO preferred to the reference about 80% of the time
#          at 6.9B; at 1B it over-optimises.
#
# Memory, computed by --dry_run and not measured: prompts of 370 tokens on average (512 at most), summaries of 40
# tokens (in PPO of all 53), PPO on one H200.
#             SFT       RM        PPO
#   1b       24 GiB    22 GiB     55 GiB    all weights
#   2.8b     21 GiB    20 GiB     70 GiB    adapters of rank 64
#   6.9b     40 GiB    40 GiB    102 GiB    adapters of rank 64
#
# PPO samples the published 512 responses of a step 256 at a time, or as many as fit into half of the free memory:
# at 6.9b 172 on an H200. An A100 of 80 GB also works, with 175 at 2.8b and 65 at 6.9b.
#
# Differs  15% of the prompts are held out, so an epoch has 15% fewer steps. AdamW's ε is 1e-8 in SFT and RM, and
#          their learning rate falls linearly to a tenth, not as a cosine. Sampling stops at EOS. Prompts that are
#          too long are dropped, not cut. 2.8B and 6.9B train adapters, with ten times the learning rate; the paper
#          trains all weights.
set -e
SIZE=${SIZE:-1b}
MODEL=${MODEL:-models/pythia-$SIZE-deduped}
RUN=runs/tldr-$SIZE
PROMPTS=${PROMPTS:-512}
LORA="--lora_rank 64" LR=3e-5
if [ "$SIZE" = 1b ]; then LORA="--lora_rank 0" LR=3e-6; fi

echo "nplus_tldr, after N+ (arXiv 2403.17031): every stage with its flags"
set -x

python train_sft.py --data data/tldr_sft.jsonl --init "$MODEL" --out "$RUN-sft" --loss_on_prompt \
    --steps 775 --batch_size 128 --lr $LR --weight_decay 0.01 --max_grad_norm 1e6 $LORA \
    --tokens_per_microbatch 4096 --dtype bfloat16 "$@"

python train_rm.py --data data/tldr_pairs.jsonl --init "$RUN-sft/model" --references data/tldr_sft.jsonl \
    --out "$RUN-rm" --steps 1233 --batch_size 64 --lr $LR --weight_decay 0.01 --max_grad_norm 1e6 $LORA \
    --tokens_per_microbatch 4096 --dtype bfloat16 "$@"

python train_ppo.py --data data/tldr_sft.jsonl --init "$RUN-sft/model" --rm "$RUN-rm/model" \
    --out "$RUN-ppo" --steps $((1000000 / PROMPTS)) --prompts_per_step $PROMPTS --max_new_tokens 53 \
    --temperature 0.7 --epochs 4 --minibatches 1 --lr $LR --critic_lr $LR --max_grad_norm 1e6 \
    --beta 0.05 --gamma 1 --lam 0.95 --clip 0.2 --eval_prompts 128 \
    --no_eos_score -1 $LORA \
    --tokens_per_microbatch 2048 --dtype bfloat16 "$@"
