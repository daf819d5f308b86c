#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with QLoRA: as finetune_lora_llava1_5.sh, the language model's weights in 4 bits (NF4). Weights come
# from the ckpt_path entries of MM_MODEL, the projector's from stage 1's save folder or from a projector file. A base that was
# stored in 4 bits (convert --quantize) is given as --pretrained-checkpoint.
#   PRETRAINED_PATH=save_dir SAVE_PATH=save_dir_qlora bash examples/llava1.5/finetune_qlora_llava1_5.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export MM_MODEL="${MM_MODEL:-examples/llava1.5/model_finetune_qlora.json}"
export SAVE_PATH="${SAVE_PATH:-save_dir_qlora}"
export PROJECTOR_PATH="${PROJECTOR_PATH:-${PRETRAINED_PATH:-}}" PRETRAINED_PATH=

exec bash examples/llava1.5/finetune_llava1_5.sh --lr 2.0e-4 "$@"
