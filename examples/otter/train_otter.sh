#!/usr/bin/env bash
# Otter: trains the perceiver, the gated cross-attention and the rows of the special words on conversations, at the
# public defaults. Variables and flags are those of examples/llava1.5/finetune_llava1_5.sh:
#   NPUS_PER_NODE=1 GBS=16 bash examples/otter/train_otter.sh --train-iters 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export MM_MODEL="${MM_MODEL:-examples/otter/model_mpt7b.json}"
export MM_DATA="${MM_DATA:-examples/otter/data.json}"
export SAVE_PATH="${SAVE_PATH:-save_dir_otter}"
export MBS="${MBS:-2}" # what fits into 64 GB a device beside the decoder
export TRAIN_ITERS="${TRAIN_ITERS:-5197}" # 665,298 conversations / GBS 128, the last batch cut off

exec bash examples/llava1.5/finetune_llava1_5.sh --lr 1.0e-5 --weight-decay 0.1 "$@"
