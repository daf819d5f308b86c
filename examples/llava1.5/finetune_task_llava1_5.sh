#!/usr/bin/env bash
# LLaVA's finetune_task: a whole LLaVA-1.5 (ckpt_path entries of MM_MODEL) goes on with your own conversations (MM_DATA), the
# language model and the projector trained. Variables and flags are those of finetune_llava1_5.sh, which this script calls:
#   MM_DATA=my_data.json TRAIN_ITERS=500 SAVE_PATH=save_dir_task bash examples/llava1.5/finetune_task_llava1_5.sh
# LLaVA's finetune_task_lora is the same with --lora-r 128 --lora-alpha 256 --lora-dropout 0.05 --lr 2e-4 --mm-projector-lr 2e-5.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export MM_MODEL="${MM_MODEL:-examples/llava1.5/model_finetune_task.json}"
export SAVE_PATH="${SAVE_PATH:-save_dir_task}"

exec bash examples/llava1.5/finetune_llava1_5.sh "$@"
