#!/usr/bin/env bash
# HA-DPO's preference training of MiniGPT-4 (Llama 2, 7B) and InstructBLIP (Vicuna, 13B): adapters on q, k and v of the
# language model. Hyper-parameters are those of HA-DPO's commands.
# Every variable below can be set from the environment; flags after the script's name are passed on and win:
#   MODEL=instructblip TRAIN_ITERS=140 bash examples/hallucination/dpo_qformer.sh --pref-beta 0.2
# Relative paths are taken from the root of the repository, whatever folder the script is started from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source examples/llava1.5/ascend.sh

export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # keeps communication in order, as Megatron asks

NPUS_PER_NODE="${NPUS_PER_NODE:-8}"
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

MODEL="${MODEL:-minigpt4}"
case "$MODEL" in # learning rate, warm-up steps, steps
    minigpt4) LR=1e-4 WARMUP=100 STEPS=1000 ;;
    # One epoch: the pairs that `mindspeed-mm check-data` counts, those of pope_data twice, divided by GBS.
    instructblip) LR=4e-6 WARMUP=0 STEPS="${TRAIN_ITERS:?steps of one epoch, pairs / GBS}" ;;
    *) echo "MODEL is $MODEL; expected minigpt4 or instructblip" >&2; exit 2 ;;
esac
TRAIN_ITERS="${TRAIN_ITERS:-$STEPS}"

PP="${PP:-1}"
MBS="${MBS:-1}" # pairs
PRECISION="${PRECISION:-bf16}" # bf16, fp16 or fp32
GBS="${GBS:-32}"

MM_DATA="${MM_DATA:-examples/hallucination/$MODEL/data.json}"
MM_MODEL="${MM_MODEL:-examples/hallucination/$MODEL/model.json}"
TP="${TP:-1}"
SAVE_PATH="${SAVE_PATH:-save_dir_dpo_$MODEL}"
LOAD_PATH="${LOAD_PATH:-$SAVE_PATH}" # where there is no checkpoint yet, training starts from the weights of MM_MODEL

# Ranks share the optimizer's state.
MEMORY_ARGS=(--use-distributed-optimizer)
if ((TP > 1)); then MEMORY_ARGS+=(--sequence-parallel); fi # activations between the matrices are shared as well

PRECISION_ARGS=()
if [[ "$PRECISION" != fp32 ]]; then PRECISION_ARGS=("--$PRECISION"); fi

# SIGTERM goes through torchrun to the ranks, which save and stop: it waits so long before it kills them. SIGUSR1 does the
# same where it is sent to the ranks, or to every process as Slurm does, since torchrun itself takes no notice of it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
trap '' USR1
exec torchrun \
    --nproc_per_node "$NPUS_PER_NODE" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --logs-specs mindspeed_mm \
    -m mindspeed_mm train \
    --mm-data "$MM_DATA" --mm-model "$MM_MODEL" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --micro-batch-size "$MBS" --global-batch-size "$GBS" \
    ${MEMORY_ARGS[@]+"${MEMORY_ARGS[@]}"} ${PRECISION_ARGS[@]+"${PRECISION_ARGS[@]}"} \
    --lr "$LR" --train-iters "$TRAIN_ITERS" --lr-decay-style cosine --lr-warmup-iters "$WARMUP" \
    --weight-decay 0.0 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.999 \
    --seed 42 --num-workers 8 --distributed-backend nccl \
    --load "$LOAD_PATH" \
    --save "$SAVE_PATH" --save-interval 1000 --log-interval 1 \
    "$@"
