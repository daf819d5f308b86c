#!/usr/bin/env bash
# Score a model on the benchmark TSV of evaluate_llava1_5.json. A killed run goes on where it was.
# Every variable below can be set from the environment; flags after the script's name are passed on and win:
#   NPUS_PER_NODE=1 LOAD_PATH=save_dir bash examples/llava1.5/evaluate_llava1_5.sh --batch-size 16
# Relative paths are taken from the root of the repository, whatever folder the script is started from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-7200}" # as the ancestor's evaluation does
export HCCL_EXEC_TIMEOUT="${HCCL_EXEC_TIMEOUT:-7200}"
source examples/llava1.5/ascend.sh

NPUS_PER_NODE="${NPUS_PER_NODE:-1}" # any number: the questions need not divide by it
MASTER_ADDR="${MASTER_ADDR:-localhost}"
FREE_PORT=29501 # on one host: the first from here on that no other run has
if [[ -z "${MASTER_PORT:-}" && "${NNODES:-1}" == 1 ]]; then
    while (: >"/dev/tcp/127.0.0.1/$FREE_PORT") 2>/dev/null; do FREE_PORT=$((FREE_PORT + 1)); done
fi
MASTER_PORT="${MASTER_PORT:-$FREE_PORT}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
# The cores of this host shared by its ranks; torchrun alone would give each rank one.
CORES="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > NPUS_PER_NODE ? CORES / NPUS_PER_NODE : 1))}"

MM_MODEL="${MM_MODEL:-examples/llava1.5/evaluate_llava1_5.json}"
LOAD_PATH="${LOAD_PATH:-}" # a training checkpoint to evaluate, instead of the ckpt_path entries of MM_MODEL

torchrun \
    --nproc_per_node "$NPUS_PER_NODE" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --logs-specs mindspeed_mm \
    -m mindspeed_mm evaluate --mm-model "$MM_MODEL" ${LOAD_PATH:+--load "$LOAD_PATH"} "$@"
