#!/usr/bin/env bash
# PHOENIX (arXiv 2401.10580): SFT and DPO in another language, on machine-translated data; there German.
#
#   bash recipes/phoenix_german.sh              further flags go to both stages
#
# Needs    models/Qwen2.5-1.5B, data/ultrachat_de.jsonl (messages) and data/ultrafeedback_de.jsonl (chosen and
#          rejected messages), both translated; the paper used ALMA-13B. Any other language works the same way.
#
# Memory, computed by --dry_run and not measured: one A100 of 80 GB.
#   SFT          41 GiB  (conversations of 1,350 tokens on average)
#   DPO          43 GiB  (prompt and response together 900 tokens on average, 2,048 at most)
#
# The reference of DPO is the SFT model in the new language, not the original model. Translation makes errors, so
# some labels are wrong: --loss cdpo --label_smoothing 0.1 takes that into account. The first language may get
# worse; measure it too (evaluate.py).
#
# Differs  PHOENIX starts from LeoLM's Mistral-7B, a family that nanorlhf/hub/families.py does not know. Learning rate
#          and β are those of the alignment handbook, quoted from memory. One epoch. 15% of the prompts are held out.
set -e
MODEL=${MODEL:-models/Qwen2.5-1.5B}

echo "phoenix_german, after PHOENIX (arXiv 2401.10580): every stage with its flags"
set -x

python train_sft.py --data data/ultrachat_de.jsonl --init "$MODEL" --out runs/phoenix-sft --skip_bad_rows \
    --steps 345 --batch_size 512 --lr 2e-5 --weight_decay 0 --tokens_per_microbatch 4096 \
    --lora_rank 0 --dtype bfloat16 "$@"

python train_dpo.py --data data/ultrafeedback_de.jsonl --init runs/phoenix-sft/model --skip_bad_rows \
    --out runs/phoenix-dpo --loss dpo --beta 0.1 --lr 5e-7 --batch_size 32 --steps 1620 \
    --max_new_tokens 512 --eval_prompts 64 --eval_every 500 --save_every 500 \
    --tokens_per_microbatch 4096 --lora_rank 0 --dtype bfloat16 "$@"
