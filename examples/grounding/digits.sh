#!/usr/bin/env bash
# Where is the seven? LLaVA learns to answer with boxes, on CPU: see README.md beside this file.
#   bash examples/grounding/digits.sh [--out DIR] [--fast] [--seed N] [--clean]
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
CALLED_FROM="$PWD"
source "$ROOT/scripts/usage.sh"
usage "$@"
bash "$ROOT/scripts/setup_env.sh"
cd "$ROOT"
exec .venv/bin/python -m examples.grounding.digits --relative-to "$CALLED_FROM" "$@"
