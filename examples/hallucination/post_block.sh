#!/usr/bin/env bash
# The post-interaction block on LLaVA-1.5-7B, trained on HA-DPO's pairs: STAGE=1 trains the block alone, STAGE=2 goes on
# with the block and the decoder's head. The settings are the guide's: 4 devices, 2 pairs each, 16 micro-batches, 5e-7.
# Variables and flags are those of dpo_llava1_5.sh, which this calls:
#   bash examples/hallucination/post_block.sh && STAGE=2 bash examples/hallucination/post_block.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

STAGE="${STAGE:-1}"
case "$STAGE" in
1) DEFAULT_MODEL=examples/hallucination/model_post_block.json HEAD=False ;;
2) DEFAULT_MODEL=examples/hallucination/model_post_block_2.json HEAD=True ;;
*)
    echo "STAGE is $STAGE; expected 1 (the block) or 2 (the block and the head)" >&2
    exit 2
    ;;
esac
export MM_MODEL="${MM_MODEL:-$DEFAULT_MODEL}"
export NPUS_PER_NODE="${NPUS_PER_NODE:-4}" MBS="${MBS:-2}" GBS="${GBS:-128}"
export SAVE_PATH="${SAVE_PATH:-save_dir_post_block_$STAGE}"

exec bash examples/hallucination/dpo_llava1_5.sh \
    --lr 5.0e-7 --freeze_backbone True --tune_mm_mlp_adapter False \
    --tune_post_interaction_block True --tune_lm_head "$HEAD" \
    "$@"
