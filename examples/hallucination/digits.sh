#!/usr/bin/env bash
# Preference training against naming digits that are not there, on CPU: see README.md beside this file.
#   bash examples/hallucination/digits.sh [--out DIR] [--quickstart DIR] [--fast] [--clean]
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
CALLED_FROM="$PWD"
source "$ROOT/scripts/usage.sh"
usage "$@"
bash "$ROOT/scripts/setup_env.sh"
cd "$ROOT"
exec .venv/bin/python -m examples.hallucination.digits --relative-to "$CALLED_FROM" "$@"
