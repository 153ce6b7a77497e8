#!/usr/bin/env bash
# Runs the checks: scripts/test.sh [--stack current|gcu2.3] [pytest arguments...]
#
# The current stack is linted, type-checked and tested; gcu2.3 (Python 3.10, torch 2.3.0, the stack
# of the GCU guide) is tested only, as the linters belong to the current one. Everything runs even
# when something before it failed, and pytest's closing line is the last thing printed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

stack=current
while [[ $# -gt 0 ]]; do
    case "$1" in
        --stack)
            [[ $# -ge 2 ]] || die "--stack needs a value: current or gcu2.3"
            stack="$2"
            shift 2
            ;;
        --stack=*)
            stack="${1#--stack=}"
            shift
            ;;
        -h | --help)
            printf 'usage: scripts/test.sh [--stack current|gcu2.3] [pytest arguments...]\n'
            exit 0
            ;;
        *) break ;;
    esac
done

case "$stack" in
    current) venv=.venv ;;
    gcu2.3) venv=.venv-gcu2.3 ;;
    *) die "unknown stack '$stack': it is current or gcu2.3" ;;
esac

cd "$ROOT"
ensure_venv "$venv" "$stack"
[[ "$stack" != current ]] || ensure_chromium
[[ "$stack" != current ]] || ensure_postgres
[[ "$stack" != current ]] || ensure_triton "$venv"
bin="$ROOT/$venv/bin"

# The checks run side by side, as the slowest uses one core; each says what it found in its turn.
failed=() names=() pids=()
said="$(mktemp -d)"
trap 'kill "${pids[@]}" 2>/dev/null || true; rm -rf "$said"' EXIT
begin() { # NAME COMMAND...
    names+=("$1")
    "${@:2}" >"$said/${#pids[@]}" 2>&1 &
    pids+=("$!")
}

if [[ "$stack" == current ]]; then
    begin "ruff check" "$bin/ruff" check
    begin "ruff format" "$bin/ruff" format --check
    begin "lint-imports" "$bin/lint-imports" --no-cache --no-logo
    begin "mypy" "$bin/mypy"
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}" || failed+=("${names[$i]}")
        cat "$said/$i"
    done
    pids=()
fi

workers="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
((workers <= 4)) || workers=4

# One thread a process: the suite starts many at once, and results should not depend on the machine.
# Threads that wait give their core away: the suite has more processes than cores.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# pytest repeats this line beside its own summary, where nobody overlooks it.
OPENSORA_SP_LINT_FAILED="$(IFS=,; printf '%s' "${failed[*]-}")"
export OPENSORA_SP_LINT_FAILED

status=0
"$bin/python" -m pytest -n "$workers" --dist worksteal "$@" || status=$?
[[ "$status" != 0 || "${#failed[@]}" == 0 ]] || status=1
exit "$status"
