#!/usr/bin/env bash
# Stage 1 of XTuner's LLaVA with InternLM2: trains the projector on captions; the language model lies in 4 bits (NF4).
# Variables and flags are those of examples/llava1.5/pretrain_llava1_5.sh:
#   NPUS_PER_NODE=1 MBS=4 bash examples/internlm2/pretrain_internlm2.sh --train-iters 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export MM_MODEL="${MM_MODEL:-examples/internlm2/model_pretrain.json}"
export MM_DATA="${MM_DATA:-examples/internlm2/data_pretrain.json}"
export SAVE_PATH="${SAVE_PATH:-save_dir_internlm2}"
export MBS="${MBS:-32}" GBS="${GBS:-256}"
export TRAIN_ITERS="${TRAIN_ITERS:-2181}" # 558,128 captions / 256, as XTuner counts them

exec bash examples/llava1.5/pretrain_llava1_5.sh --clip-grad 1.0 "$@"
