#!/usr/bin/env bash
# Sets up .venv and runs the tests: without arguments all but the slow ones, else `pytest` with the arguments given.
#   bash scripts/test.sh [ARGUMENT_OF_PYTEST ...]
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/usage.sh"
usage "$@"
cd "$ROOT"
bash scripts/setup_env.sh
# The models of the tests are tiny and many tests start several ranks, more threads would only fight each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A file's tests stay together, so that each of the two processes loads its models and starts its ranks once. Files go in
# their own order: by number of tests the longest ones, which have few, would come last, while one process has nothing to do.
if [[ $# -eq 0 ]]; then set -- -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder; fi
exec .venv/bin/python -m pytest "$@"
