#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5: trains the language model and the projector on conversations.
# Every variable below can be set from the environment; flags after the script's name are passed on and win:
#   PRETRAINED_PATH=save_dir SAVE_PATH=save_dir_finetune bash examples/llava1.5/finetune_llava1_5.sh
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

PP="${PP:-1}"
CP="${CP:-1}"
MBS="${MBS:-4}"
PRECISION="${PRECISION:-bf16}" # bf16, fp16 or fp32
GBS="${GBS:-128}"

MM_DATA="${MM_DATA:-examples/llava1.5/data_finetune.json}"
MM_MODEL="${MM_MODEL:-examples/llava1.5/model_finetune.json}"
# 13B needs the matrices of four devices together (46 GB a device on 8 devices of 64 GB).
case "$(basename "$MM_MODEL")" in
    model_13b_finetune.json) TP="${TP:-4}" ;;
    *) TP="${TP:-1}" ;;
esac
MM_TOOL="${MM_TOOL:-examples/llava1.5/tools.json}"
# Save folder of stage 1, or a projector file; not needed where MM_MODEL names a trained projector. A base in 4 bits takes the
# projector alone from it (PROJECTOR_PATH).
PRETRAINED_PATH="${PRETRAINED_PATH:-}"
PROJECTOR_PATH="${PROJECTOR_PATH:-}"
if [[ -f "$PRETRAINED_PATH" ]]; then PROJECTOR_PATH="$PRETRAINED_PATH" PRETRAINED_PATH=""; fi
SAVE_PATH="${SAVE_PATH:-save_dir_finetune}"
LOAD_PATH="${LOAD_PATH:-$SAVE_PATH}" # where there is no checkpoint yet, training starts from PRETRAINED_PATH

# 665,298 conversations (llava_v1_5_mix665k) / GBS 128 = 5,197 steps for one epoch, the last batch cut off.
TRAIN_ITERS="${TRAIN_ITERS:-5197}"

PRETRAINED_ARGS=()
if [[ -n "$PRETRAINED_PATH" ]]; then PRETRAINED_ARGS=(--pretrained-checkpoint "$PRETRAINED_PATH"); fi
if [[ -n "$PROJECTOR_PATH" ]]; then PRETRAINED_ARGS+=(--pretrain-mm-mlp-adapter "$PROJECTOR_PATH"); fi

# Ranks share the optimizer's state: 7B needs 55 GB a device on 8 devices with it, 149 GB without.
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
    --mm-data "$MM_DATA" --mm-model "$MM_MODEL" --mm-tool "$MM_TOOL" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP" \
    --micro-batch-size "$MBS" --global-batch-size "$GBS" \
    ${MEMORY_ARGS[@]+"${MEMORY_ARGS[@]}"} ${PRECISION_ARGS[@]+"${PRECISION_ARGS[@]}"} \
    --lr 2.0e-5 --train-iters "$TRAIN_ITERS" --lr-decay-style cosine --lr-warmup-fraction 0.03 \
    --weight-decay 0.0 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.999 \
    --num-workers 8 --distributed-backend nccl \
    --load "$LOAD_PATH" ${PRETRAINED_ARGS[@]+"${PRETRAINED_ARGS[@]}"} \
    --save "$SAVE_PATH" --save-interval 1000 --log-interval 1 \
    "$@"
