#!/usr/bin/env bash
# LoRA on the language model of Qwen2.5-VL (images at their own sizes); vision encoder and merger stay as they are.
# Variables and flags are those of examples/llava1.5/finetune_llava1_5.sh:
#   MM_DATA=my_data.json SAVE_PATH=save_dir_qwen bash examples/qwen2_5_vl/finetune_lora_qwen2_5_vl.sh --train-iters 1000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export MM_MODEL="${MM_MODEL:-examples/qwen2_5_vl/model_lora.json}"
export MM_DATA="${MM_DATA:-examples/qwen2_5_vl/data.json}"
export SAVE_PATH="${SAVE_PATH:-save_dir_qwen2_5_vl}"
export MBS="${MBS:-1}"

exec bash examples/llava1.5/finetune_llava1_5.sh --lr 1.0e-4 "$@"
