#!/usr/bin/env bash
# Runs the core part of the tests with other versions of megatron-core: scripts/test_compat.sh [VERSION ...]
# Each version goes into a folder of its own (.compat/), which stands before the set-up's own megatron-core on the path.
# Needs the package registry once for each version. Prints a line with the counts for each, exit code 1 if any failed.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
bash scripts/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
VERSIONS=("${@:-0.16.0}")
# Parity, parallel layouts, checkpoints, resuming and generation.
PARTS=(tests/parity tests/parallel/test_golden_layouts.py
    tests/driver/test_driver_training.py tests/driver/test_driver_ranks.py tests/driver/test_driver_resume.py
    tests/driver/test_optimizer_kinds.py tests/checkpoint_converters/test_from_training.py
    tests/checkpoint_converters/test_checkpoint_target.py tests/generation/test_transformers_generate.py
    tests/generation/test_parallel_generation.py tests/platform/test_platform.py)

failed=0
for version in "${VERSIONS[@]}"; do
    folder="$ROOT/.compat/megatron-core-$version"
    if [[ ! -d "$folder/megatron/core" ]]; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "megatron-core==$version"
    fi
    found="$(PYTHONPATH="$folder" .venv/bin/python -c 'import importlib.metadata as m; print(m.version("megatron-core"))')"
    if [[ "$found" != "$version" ]]; then
        printf 'megatron-core %s: error: version %s was found in %s\n' "$version" "$found" "$folder" >&2
        exit 1
    fi
    log="$ROOT/.compat/megatron-core-$version.log"
    if PYTHONPATH="$folder" .venv/bin/python -m pytest -m "not slow" -p no:cacheprovider "${PARTS[@]}" >"$log" 2>&1; then
        verdict=passed
    else
        verdict="failed, see $log"
        failed=1
    fi
    printf 'megatron-core %s: %s: %s\n' "$version" "$verdict" "$(grep -E '(passed|failed)' "$log" | tail -n 1)"
done
exit "$failed"
