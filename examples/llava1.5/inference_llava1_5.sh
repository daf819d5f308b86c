#!/bin/bash
# Answer the prompts of inference_llava.json. Every variable can be set from the environment; further flags win:
#   bash examples/llava1.5/inference_llava1_5.sh --image view.jpg --prompt "What is this?"
# Relative paths are taken from the root of the repository, whatever folder the script is started from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MM_MODEL=${MM_MODEL:-examples/llava1.5/inference_llava.json}
LOAD_PATH=${LOAD_PATH:-}   # a training checkpoint to answer with, instead of the ckpt_path entries of MM_MODEL

ASCEND_ENV=/usr/local/Ascend/ascend-toolkit/set_env.sh
if [ -f "$ASCEND_ENV" ]; then
    set +u
    source "$ASCEND_ENV"
    set -u
fi

python -m mindspeed_mm infer --mm-model "$MM_MODEL" ${LOAD_PATH:+--load "$LOAD_PATH"} "$@"
