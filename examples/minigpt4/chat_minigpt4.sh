#!/usr/bin/env bash
# Talk with a MiniGPT-4 in the demo's conversation: a checkpoint of train_minigpt4.sh, or a model.json of public files.
#   LLM=gemma MODEL=save_dir_stage2 bash examples/minigpt4/chat_minigpt4.sh --image cat.jpg
#   LLM=v2 MODEL=examples/minigpt4/model_v2.json bash examples/minigpt4/chat_minigpt4.sh
# Flags after the script's name are passed on and win. Paths are relative to the current folder.
set -euo pipefail

LLM="${LLM:-vicuna}" # vicuna, llama2, gemma (as the guide trained it) or v2
MODEL="${MODEL:-save_dir_stage2}"
case "$LLM" in
    vicuna | llama2 | v2) TEMPLATE="minigpt4_${LLM}_chat" ;;
    gemma) TEMPLATE=minigpt4_gemma_guide_chat ;;
    *) echo "LLM is $LLM; expected vicuna, llama2, gemma or v2" >&2; exit 2 ;;
esac

# How the original's demo answers.
exec python -m mindspeed_mm chat --model "$MODEL" --template "$TEMPLATE" --max-context-len 2000 \
    --max-new-tokens 300 --temperature 1.0 --top-p 0.9 --option repetition_penalty=1.05 \
    "$@"
