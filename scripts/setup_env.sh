#!/usr/bin/env bash
# Makes the checkout's virtual environment (.venv) from constraints.txt, or leaves at once when it is up to date.
# Needs a Python 3.10-3.12 with venv and pip, and a C compiler. PYTHON=/path/to/python picks the interpreter.
# Everything it says goes to stderr; two of them may run at the same time.
#   bash scripts/setup_env.sh
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/usage.sh"
usage "$@"
VENV="$ROOT/.venv"
STAMP="$VENV/.mindspeed-mm-setup"
EXTRAS="dev"
export PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME

say() { printf 'set-up: %s\n' "$*" >&2; }
die() { printf 'set-up: error: %s\n' "$*" >&2; exit 1; }
[[ $# -eq 0 ]] || die "found $*; it takes no arguments, see --help"

# Changes whenever a requirement, this script, the interpreter or the place of the checkout does.
fingerprint() {
    { printf '%s %s\n' "$ROOT" "$EXTRAS"
      cat "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/scripts/setup_env.sh" "$VENV/pyvenv.cfg"
    } | cksum
}

up_to_date() {
    [[ -x "$VENV/bin/python" && -f "$VENV/pyvenv.cfg" && -f "$STAMP" && "$(cat "$STAMP")" == "$(fingerprint)" ]]
}

# Runs the candidate, because a launcher on PATH (pyenv's, say) may exist and still not start.
usable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        usable_python "$PYTHON" || die "PYTHON=$PYTHON is not a working Python 3.10, 3.11 or 3.12"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        if usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.10, 3.11 or 3.12 on PATH; install one (3.11 is what the tests run with) or set PYTHON=/path/to/python"
}

find_compiler() {
    local candidate
    for candidate in "${CC:-cc}" gcc clang; do
        if command -v "$candidate" >/dev/null 2>&1; then return; fi
    done
    die "no C compiler (cc, gcc or clang) on PATH; install one, for example the package build-essential or gcc"
}

make_venv() {
    local python="$1"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python has no venv or no pip; install them (for example the package python3-venv) or set PYTHON to another Python"
    say "creating $VENV with $("$python" -V)"
    "$python" -m venv --clear "$VENV" || die "$python could not create $VENV; the lines above say why"
}

install() {
    say "installing the pinned requirements (minutes the first time)"
    (cd "$ROOT" && "$VENV/bin/python" -m pip install --disable-pip-version-check \
        --config-settings editable_mode=compat -c constraints.txt -e ".[$EXTRAS]") >&2 ||
        die "pip could not install the requirements; the lines above say why (no network, or no wheel for this Python?)"
}

if up_to_date; then exit 0; fi

python="$(find_python)"
find_compiler
# The lock belongs to descriptor 9, which this shell keeps open until it ends. Python takes it: flock(1) may be missing.
exec 9<"$ROOT"
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
if up_to_date; then exit 0; fi  # another run did it while this one waited

usable_python "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv "$python"
rm -f "$STAMP"
install
fingerprint >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "done: $VENV"
