#!/usr/bin/env bash
# Trains LLaVA-1.5 to answer with boxes: referring expressions (REC) in Shikra's form.
# Every variable of examples/llava1.5/finetune_llava1_5.sh can be set; flags after the script's name are passed on and win:
#   TRAIN_ITERS=20000 SAVE_PATH=save_dir_rec bash examples/grounding/rec_llava1_5.sh --lr 4e-5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export MM_DATA="${MM_DATA:-examples/grounding/data_rec.json}"
export MM_MODEL="${MM_MODEL:-examples/llava1.5/model_finetune.json}"
export SAVE_PATH="${SAVE_PATH:-save_dir_rec}"
export GBS="${GBS:-64}"
# So many steps are one epoch: lines of the data file / GBS. Shikra's recipe takes five.
export TRAIN_ITERS="${TRAIN_ITERS:?give TRAIN_ITERS, epochs x lines of the data file / $GBS}"

exec bash examples/llava1.5/finetune_llava1_5.sh "$@"
