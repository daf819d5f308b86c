#!/usr/bin/env bash
# Runs the core part of the tests on other sets of versions: bash scripts/test_compat.sh [PYTHON:MEGATRON_CORE[:TORCH] ...]
#   bash scripts/test_compat.sh                      what .ci/run tests beside the pinned set
#   bash scripts/test_compat.sh 3.11:0.16.1:2.7.1    torch 2.7.1, which is the vendor's
# A Python and torch of their own get a virtual environment in .compat/, made once from constraints.txt; a megatron-core of
# its own goes into a folder there that stands before the environment's. Prints a line with the counts for each set. Exit code
# 1 if one failed. A Python that the machine does not have is said and left out.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/usage.sh"
usage "$@"
cd "$ROOT"
bash scripts/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [[ $# -eq 0 ]]; then set -- 3.11:0.12.1 3.11:0.16.0 3.10:0.16.1; fi
# Parity, parallel layouts, checkpoints, resuming and generation.
PARTS=(tests/parity tests/parallel/test_golden_layouts.py
    tests/driver/test_driver_training.py tests/driver/test_driver_ranks.py tests/driver/test_driver_resume.py
    tests/driver/test_optimizer_kinds.py tests/checkpoint_converters/test_from_training.py
    tests/checkpoint_converters/test_checkpoint_target.py tests/generation/test_transformers_generate.py
    tests/generation/test_parallel_generation.py tests/platform/test_platform.py)

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
installed() { PYTHONPATH="${3:-}" "$1" -c "import importlib.metadata as m; print(m.version('$2').split('+')[0])"; }

# Pythons of pyenv lie in its folders; the commands of that name on PATH need not start.
find_python() {
    local candidate
    for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
        if [[ "$(version_of "$candidate")" == "$1" ]]; then printf '%s\n' "$candidate"; return; fi
    done
}

# The environment's interpreter; empty where the machine has no such Python.
environment() {
    local python="$1" torch="$2" folder base constraints
    if [[ "$(version_of .venv/bin/python)" == "$python" && "$torch" == pinned ]]; then printf '%s\n' .venv/bin/python; return; fi
    folder="$ROOT/.compat/python-$python-torch-$torch"
    if [[ ! -f "$folder/.done" ]]; then
        base="$(find_python "$python")"
        if [[ -z "$base" ]]; then return; fi
        "$base" -m venv --clear "$folder"
        constraints="$folder/constraints.txt"
        if [[ "$torch" == pinned ]]; then cp constraints.txt "$constraints"; else
            sed "s/^torch==.*/torch==$torch/" constraints.txt >"$constraints"
        fi
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat \
            -c "$constraints" -e ".[dev]" >&2
        touch "$folder/.done"
    fi
    printf '%s\n' "$folder/bin/python"
}

failed=0
for set in "$@"; do
    IFS=: read -r python core torch <<<"$set:"
    torch="${torch%:}"
    interpreter="$(environment "$python" "${torch:-pinned}")"
    if [[ -z "$interpreter" ]]; then
        printf 'Python %s, megatron-core %s: left out: this machine has no Python %s\n' "$python" "$core" "$python"
        continue
    fi
    folder=""
    if [[ "$(installed "$interpreter" megatron-core)" != "$core" ]]; then
        folder="$ROOT/.compat/megatron-core-$core-python-$python"
        if [[ ! -d "$folder/megatron/core" ]]; then
            "$interpreter" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "megatron-core==$core"
        fi
    fi
    found="$(installed "$interpreter" megatron-core "$folder")"
    if [[ "$found" != "$core" ]]; then
        printf 'megatron-core %s: error: version %s was found\n' "$core" "$found" >&2
        exit 1
    fi
    log="$ROOT/.compat/$python-$core-${torch:-pinned}.log"
    mkdir -p "$ROOT/.compat"
    if PYTHONPATH="$folder" "$interpreter" -m pytest -m "not slow" -n 2 --dist loadfile -p no:cacheprovider "${PARTS[@]}" >"$log" 2>&1; then
        verdict=passed
    else
        verdict="failed, see $log"
        failed=1
    fi
    printf 'Python %s, torch %s, megatron-core %s: %s: %s\n' "$python" "$(installed "$interpreter" torch)" "$core" "$verdict" \
        "$(grep -E '(passed|failed|error)' "$log" | tail -n 1)"
done
exit "$failed"
