#!/usr/bin/env bash
# Stage 2 of XTuner's LLaVA with InternLM2: QLoRA on the language model (rank 512), LoRA on the vision encoder (rank 64),
# and the projector. It begins with stage 1's save folder or, where PRETRAINED_PATH is a file, with that projector and the
# ckpt_path entries of MM_MODEL. Variables and flags are those of examples/llava1.5/finetune_llava1_5.sh:
#   PRETRAINED_PATH=save_dir_internlm2 bash examples/internlm2/finetune_qlora_internlm2.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export MM_MODEL="${MM_MODEL:-examples/internlm2/model_finetune_qlora.json}"
export MM_DATA="${MM_DATA:-examples/internlm2/data_finetune.json}"
export PRETRAINED_PATH="${PRETRAINED_PATH-save_dir_internlm2}"
export SAVE_PATH="${SAVE_PATH:-save_dir_internlm2_qlora}"
export MBS="${MBS:-16}"
export TRAIN_ITERS="${TRAIN_ITERS:-5198}" # 665,298 conversations / GBS 128, as XTuner counts them

exec bash examples/llava1.5/finetune_llava1_5.sh --lr 2.0e-4 "$@"
