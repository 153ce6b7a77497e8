#!/usr/bin/env bash
# Runs the checks: scripts/test.sh [--stack current|gcu2.3|gcu2.10] [pytest arguments...]
#
# The current stack is linted, type-checked and tested. gcu2.3 (Python 3.10, torch 2.3.0, the stack
# of the GCU guide) and gcu2.10 (Python 3.12, torch 2.10.0, the stack of torch_gcu 2.10) are tested
# only, as the linters belong to the current one. Their torch is the index's: on x86_64 a CUDA build
# of several GB. Everything runs even when something before it failed, and pytest's closing line is
# the last thing printed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

stack=current
while [[ $# -gt 0 ]]; do
    case "$1" in
        --stack)
            [[ $# -ge 2 ]] || die "--stack needs a value: current, gcu2.3 or gcu2.10"
            stack="$2"
            shift 2
            ;;
        --stack=*)
            stack="${1#--stack=}"
            shift
            ;;
        -h | --help)
            printf 'usage: scripts/test.sh [--stack current|gcu2.3|gcu2.10] [pytest arguments...]\n'
            exit 0
            ;;
        *) break ;;
    esac
done

case "$stack" in
    current) venv=.venv ;;
    gcu2.3 | gcu2.10) venv=".venv-$stack" ;;
    *) die "unknown stack '$stack': it is current, gcu2.3 or gcu2.10" ;;
esac

cd "$ROOT"
chromium=""
if [[ "$stack" == current ]]; then
    # Beside pip, which waits for the network and the disk as apt does.
    { ensure_chromium; ensure_postgres; } &
    chromium="$!"
fi
ensure_venv "$venv" "$stack"
[[ "$stack" != current ]] || ensure_triton "$venv"
[[ -z "$chromium" ]] || wait "$chromium"
bin="$ROOT/$venv/bin"

# The checks run side by side, and beside the tests: mypy alone would keep one core for a minute. Each
# leaves what it said in a file of its name, and its exit status in NAME.status when it has ended;
# tests/conftest.py waits for them and shows those that failed beside pytest's own summary.
names=() pids=()
OPENSORA_SP_CHECKS="$(mktemp -d)"
export OPENSORA_SP_CHECKS
trap 'kill "${pids[@]}" 2>/dev/null || true; rm -rf "$OPENSORA_SP_CHECKS"' EXIT
begin() { # NAME COMMAND...
    names+=("$1")
    check "$OPENSORA_SP_CHECKS/$1" "${@:2}" &
    pids+=("$!")
}
check() { # FILE COMMAND...
    local status=0
    "${@:2}" >"$1" 2>&1 &
    trap 'kill "$!"' TERM
    wait "$!" || status="$?"
    # In one go, or a reader might find it empty.
    printf '%s' "$status" >"$1.new" && mv "$1.new" "$1.status"
}

if [[ "$stack" == current ]]; then
    begin "ruff check" "$bin/ruff" check
    begin "ruff format" "$bin/ruff" format --check
    begin "lint-imports" "$bin/lint-imports" --no-cache --no-logo
    begin "mypy" "$bin/mypy"
fi

# One more than cores: tests wait for servers, for deadlines and for each other. -n N says otherwise.
workers="$(($(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2) + 1))"
((workers <= 4)) || workers=4

# One thread a process: the suite starts many at once, and results should not depend on the machine.
# Threads that wait give their core away: the suite has more processes than cores.
# Hundreds of interpreters start; where they may not keep what they compile, each compiles it anew.
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

status=0
# A file stays with one worker, in the order of tests/order.py. Groups (--dist loadgroup) would not
# work: xdist 3.8 sets a node id that pytest 9 does not read.
"$bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@" || status=$?
tested="$status"
for i in "${!pids[@]}"; do
    wait "${pids[$i]}" || true
    file="$OPENSORA_SP_CHECKS/${names[$i]}"
    [[ "$(cat "$file.status" 2>/dev/null)" != 0 ]] || continue
    [[ "$status" != 0 ]] || status=1
    # A pytest that did not come to its summary has not shown it.
    ((tested < 2)) || cat "$file"
done
exit "$status"
