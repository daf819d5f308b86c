#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with LoRA on the language model (r 128, alpha 256) and the projector trained as a whole at its own
# learning rate. Variables and flags are those of finetune_llava1_5.sh, which this script calls:
#   PRETRAINED_PATH=save_dir SAVE_PATH=save_dir_lora bash examples/llava1.5/finetune_lora_llava1_5.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export MM_MODEL="${MM_MODEL:-examples/llava1.5/model_finetune_lora.json}"
export SAVE_PATH="${SAVE_PATH:-save_dir_lora}"

exec bash examples/llava1.5/finetune_llava1_5.sh --lr 2.0e-4 "$@"
