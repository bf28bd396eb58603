#!/usr/bin/env bash
# PHOENIX (arXiv 2401.10580): SFT and DPO in another language, on machine-translated data; there German.
#
#   bash recipes/phoenix_german.sh              further flags are handed on to both stages
#
# Needs    models/Qwen2.5-1.5B, data/ultrachat_de.jsonl (messages) and data/ultrafeedback_de.jsonl (chosen and
#          rejected messages), both translated: there by ALMA-13B. Any other language goes the same way.
#
# Computed by --dry_run for sides of 900 tokens on average (2,048 at most), not measured; one A100 of 80 GB:
#   SFT          41 GiB, 5.4 h  (conversations of 1,350 tokens on average)
#   DPO          43 GiB, 2.8 h
#
# The reference of DPO is the SFT model in the new language, not the model that it came from. Translation
# errs, and so the labels do: --loss cdpo --label_smoothing 0.1 expects it. The old language can suffer;
# measure it too (evaluate.py).
#
# Differs  PHOENIX starts from LeoLM's Mistral-7B, a family that nanorlhf/hub/folder.py does not read; its learning
#          rate and β are those of the alignment handbook, from memory. One epoch. 15% of the prompts are held out.
set -e
MODEL=${MODEL:-models/Qwen2.5-1.5B}

python train_sft.py --data data/ultrachat_de.jsonl --init "$MODEL" --out runs/phoenix-sft --skip_bad_rows \
    --steps 345 --batch_size 512 --lr 2e-5 --weight_decay 0 --tokens_per_microbatch 4096 \
    --dtype bfloat16 "$@"

python train_dpo.py --data data/ultrafeedback_de.jsonl --init runs/phoenix-sft/model --skip_bad_rows \
    --out runs/phoenix-dpo --loss dpo --beta 0.1 --lr 5e-7 --batch_size 32 --steps 1620 \
    --max_new_tokens 512 --eval_prompts 64 --eval_every 500 --save_every 500 \
    --tokens_per_microbatch 4096 --dtype bfloat16 "$@"
