#!/usr/bin/env bash
# DPO on UltraFeedback as Zephyr does it (arXiv 2310.16944): SFT on UltraChat, then DPO.
#
#   bash recipes/dpo_ultrafeedback.sh           further flags go to both stages
#
# Needs    models/Qwen2.5-1.5B, data/ultrachat.jsonl (messages) and data/ultrafeedback.jsonl (chosen and
#          rejected messages; of the binarized set its train_prefs).
#
# Memory, computed by --dry_run and not measured: one A100 of 80 GB.
#   SFT          41 GiB  (conversations of 1,050 tokens on average)
#   DPO          43 GiB  (prompt and response together 700 tokens on average, 2,048 at most)
#
# Published  SFT: learning rate 2e-5, batch 512, one epoch of 208,000 conversations; DPO: β 0.1, learning rate
#            5e-7, batch 32, three epochs of 61,000 pairs.
# Differs    Zephyr starts from Mistral-7B, a family that nanorlhf/hub/families.py does not know. Conversations are
#            not packed. 15% of the prompts are held out, so an epoch has fewer steps. Warm-up is 5%.
set -e
MODEL=${MODEL:-models/Qwen2.5-1.5B}

echo "dpo_ultrafeedback, after Zephyr (arXiv 2310.16944): every stage with its flags"
set -x

python train_sft.py --data data/ultrachat.jsonl --init "$MODEL" --out runs/ultrachat-sft --skip_bad_rows \
    --steps 345 --batch_size 512 --lr 2e-5 --weight_decay 0 --tokens_per_microbatch 4096 \
    --lora_rank 0 --dtype bfloat16 "$@"

python train_dpo.py --data data/ultrafeedback.jsonl --init runs/ultrachat-sft/model --skip_bad_rows \
    --out runs/ultrafeedback-dpo --loss dpo --beta 0.1 --lr 5e-7 --batch_size 32 --steps 4870 \
    --max_new_tokens 512 --eval_prompts 64 --eval_every 500 --save_every 500 \
    --tokens_per_microbatch 4096 --lora_rank 0 --dtype bfloat16 "$@"
