#!/usr/bin/env bash
# The main job on real data, on CPU: set-up, data, weights, pretraining, fine-tuning with an interruption, evaluation.
#   bash examples/quickstart/run.sh [--out DIR] [--fast] [--clean]
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
CALLED_FROM="$PWD"
source "$ROOT/scripts/usage.sh"
usage "$@"
bash "$ROOT/scripts/setup_env.sh"
cd "$ROOT"
exec .venv/bin/python -m examples.quickstart.main --relative-to "$CALLED_FROM" "$@"
