#!/usr/bin/env bash
# Answers the prompts of inference_llava.json.
# Every variable below can be set from the environment; flags after the script's name are passed on and win:
#   bash examples/llava1.5/inference_llava1_5.sh --image view.jpg --prompt "What is this?"
# Relative paths are taken from the root of the repository, whatever folder the script is started from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source examples/llava1.5/ascend.sh

MASTER_ADDR="${MASTER_ADDR:-localhost}"
FREE_PORT=29501 # on one host: the first from here on that no other run has
if [[ -z "${MASTER_PORT:-}" && "${NNODES:-1}" == 1 ]]; then
    while (: >"/dev/tcp/127.0.0.1/$FREE_PORT") 2>/dev/null; do FREE_PORT=$((FREE_PORT + 1)); done
fi
MASTER_PORT="${MASTER_PORT:-$FREE_PORT}"
TP="${TP:-1}"
PP="${PP:-1}"
NPUS_PER_NODE="${NPUS_PER_NODE:-$((TP * PP))}"
# The cores of this host shared by its ranks; torchrun alone would give each rank one.
CORES="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > NPUS_PER_NODE ? CORES / NPUS_PER_NODE : 1))}"

MM_MODEL="${MM_MODEL:-examples/llava1.5/inference_llava.json}"
LOAD_PATH="${LOAD_PATH:-}" # a training checkpoint to answer with, instead of the ckpt_path entries of MM_MODEL

LOAD_ARGS=()
if [[ -n "$LOAD_PATH" ]]; then LOAD_ARGS=(--load "$LOAD_PATH"); fi

torchrun \
    --nproc_per_node "$NPUS_PER_NODE" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --logs-specs mindspeed_mm \
    -m mindspeed_mm infer \
    --mm-model "$MM_MODEL" ${LOAD_ARGS[@]+"${LOAD_ARGS[@]}"} \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    "$@"
