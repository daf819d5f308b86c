# Sourced by the launchers: the environment of Ascend's toolkit where it is installed, and the variables of the guide with
# defaults and ranges. On a host without NPUs they do nothing. `mindspeed-mm doctor` tells what each of them is for.
ASCEND_ENV="${ASCEND_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}"
# shellcheck disable=SC1090  # the toolkit's script reads variables that may be unset
if [[ -f "$ASCEND_ENV" ]]; then set +u; source "$ASCEND_ENV"; set -u; fi

export ASCEND_SLOG_PRINT_TO_STDOUT="${ASCEND_SLOG_PRINT_TO_STDOUT:-0}"
export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"
export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-1}"
export COMBINED_ENABLE="${COMBINED_ENABLE:-1}"
export CPU_AFFINITY_CONF="${CPU_AFFINITY_CONF:-1}"
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1200}"

# must_be NAME PATTERN WORDS [LOWEST HIGHEST]: the variable, where it is set, matches and lies in the range.
must_be() {
    local text="${!1-}"
    if [[ -z "${!1+set}" ]]; then return; fi
    if [[ "$text" =~ ^($2)$ ]] && { [[ $# -lt 5 ]] || ((10#$text >= $4 && 10#$text <= $5)); }; then return; fi
    printf '%s: error: %s=%s: expected %s\n' "$(basename "$0")" "$1" "$text" "$3" >&2
    exit 1
}

must_be ASCEND_RT_VISIBLE_DEVICES '[0-9]{1,4}(,[0-9]{1,4})*' 'numbers of NPUs such as 0,1,2,3'
must_be ASCEND_SLOG_PRINT_TO_STDOUT '[01]' '0 or 1'
must_be ASCEND_GLOBAL_LOG_LEVEL '[0-4]' '0, 1, 2, 3 or 4'
must_be TASK_QUEUE_ENABLE '[012]' '0, 1 or 2'
must_be COMBINED_ENABLE '[01]' '0 or 1'
must_be CPU_AFFINITY_CONF '[012](,npu[0-9]+:[0-9]+-[0-9]+)*' '0, 1 or 2, and perhaps npu0:0-1 and the like behind commas'
must_be HCCL_CONNECT_TIMEOUT '0|[1-9][0-9]{0,9}' 'an integer in [120, 7200] s' 120 7200
must_be HCCL_EXEC_TIMEOUT '0|[1-9][0-9]{0,9}' 'an integer in [0, 2147483647] s' 0 2147483647
must_be NPUS_PER_NODE '[1-9][0-9]{0,9}' 'an integer of at least 1'
