#!/usr/bin/env bash
# MiniGPT-4: STAGE=1 trains the linear on captions, STAGE=2 on detailed descriptions.
# Every variable below can be set from the environment; flags after the script's name are passed on and win:
#   STAGE=2 PRETRAINED_PATH=save_dir_stage1 LLM=gemma bash examples/minigpt4/train_minigpt4.sh --train-iters 100
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
WORLD_SIZE=$((NPUS_PER_NODE * NNODES))

TP="${TP:-1}"
PP="${PP:-1}"
STAGE="${STAGE:-1}"
case "$STAGE" in # batch of each rank, steps, those of an epoch, peak and last learning rate, warm-up steps
    1) STAGE_MBS=64 STEPS=20000 EPOCH=5000 LR=1e-4 MIN_LR=8e-5 WARMUP=5000 ;;
    2) STAGE_MBS=12 STEPS=1000 EPOCH=200 LR=3e-5 MIN_LR=1e-5 WARMUP=200 ;;
    *) echo "STAGE is $STAGE; expected 1 or 2" >&2; exit 2 ;;
esac
MBS="${MBS:-$STAGE_MBS}"
PRECISION="${PRECISION:-bf16}" # bf16, fp16 or fp32
GBS="${GBS:-$((WORLD_SIZE * MBS / (TP * PP)))}"

LLM="${LLM:-vicuna}" # vicuna (with the Q-Former), llama2 or gemma
MM_DATA="${MM_DATA:-examples/minigpt4/data_stage${STAGE}_$LLM.json}"
MM_MODEL="${MM_MODEL:-examples/minigpt4/model_$LLM.json}"
SAVE_PATH="${SAVE_PATH:-save_dir_stage$STAGE}"
LOAD_PATH="${LOAD_PATH:-$SAVE_PATH}" # where there is no checkpoint yet, training begins with the weights of MM_MODEL
PRETRAINED_PATH="${PRETRAINED_PATH:-}" # of stage 2: the folder that stage 1 has saved

# Begin of sequence, image features and text: a longer caption is cut, as max_txt_len does it.
IMAGE_TOKENS=$([[ "$LLM" == vicuna ]] && echo 32 || echo 64)
SEQ_LENGTH="${SEQ_LENGTH:-$((1 + IMAGE_TOKENS + (STAGE == 1 ? 32 : 200)))}"
TRAIN_ITERS="${TRAIN_ITERS:-$STEPS}"

PRETRAINED_ARGS=()
if [[ -n "$PRETRAINED_PATH" ]]; then PRETRAINED_ARGS=(--pretrained-checkpoint "$PRETRAINED_PATH"); fi

MEMORY_ARGS=()
if ((TP > 1)); then MEMORY_ARGS=(--sequence-parallel); fi # activations between the matrices are shared as well

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
    --micro-batch-size "$MBS" --global-batch-size "$GBS" --seq-length "$SEQ_LENGTH" \
    ${MEMORY_ARGS[@]+"${MEMORY_ARGS[@]}"} ${PRECISION_ARGS[@]+"${PRECISION_ARGS[@]}"} \
    --lr "$LR" --min-lr "$MIN_LR" --train-iters "$TRAIN_ITERS" \
    --lr-decay-style linear_warmup_cosine_lr --iters-per-epoch "$EPOCH" --lr-warmup-iters "$WARMUP" --lr-warmup-init 1e-6 \
    --weight-decay 0.05 --clip-grad 0.0 --adam-beta1 0.9 --adam-beta2 0.999 \
    --num-workers 8 --distributed-backend nccl \
    ${PRETRAINED_ARGS[@]+"${PRETRAINED_ARGS[@]}"} \
    --load "$LOAD_PATH" --save "$SAVE_PATH" --save-interval "$EPOCH" --log-interval 1 \
    "$@"
