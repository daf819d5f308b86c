#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with QLoRA: as finetune_lora_llava1_5.sh, the language model's weights in 4 bits (NF4). Weights come
# from the ckpt_path entries of MM_MODEL; the projector of stage 1 is named there (its ckpt_path may be a save folder).
#   MM_MODEL=my_qlora.json SAVE_PATH=save_dir_qlora bash examples/llava1.5/finetune_qlora_llava1_5.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export MM_MODEL="${MM_MODEL:-examples/llava1.5/model_finetune_qlora.json}"
export SAVE_PATH="${SAVE_PATH:-save_dir_qlora}"

exec bash examples/llava1.5/finetune_llava1_5.sh --lr 2.0e-4 "$@"
