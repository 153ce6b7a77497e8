#!/usr/bin/env bash
# Measures this machine's device in at most 9 minutes: scripts/gpu_day.sh [--reduced] [--out DIR]
#
# Runs in whatever is here: a Python whose torch sees an accelerator, else the environment of
# scripts/test.sh, else any Python with torch. Only when there is none of them is one installed.
# A package that is missing costs the rows that need it, and they say so.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cd "$ROOT"

# With an accelerator; a GCU's plugin registers its device when it is imported.
sees_accelerator() { # PYTHON
    "$1" - >/dev/null 2>&1 <<'PY'
import importlib.util, sys
import torch
found = torch.cuda.is_available()
if not found and importlib.util.find_spec("torch_gcu"):
    import torch_gcu
    found = torch.gcu.is_available()
sys.exit(not found)
PY
}

has_torch() { # PYTHON
    "$1" -c 'import sys, torch; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

pick_python() { # prints the one to run; fails where none has torch
    local test candidate
    for test in sees_accelerator has_torch; do
        for candidate in "${PYTHON:-}" "$ROOT"/.venv{,-gcu2.3,-gcu2.10}/bin/python python3 python; do
            if [[ -n "$candidate" ]] && "$test" "$candidate"; then
                printf '%s\n' "$candidate"
                return 0
            fi
        done
    done
    return 1
}

if ! python="$(pick_python)"; then
    ensure_venv .venv current
    python="$ROOT/.venv/bin/python"
fi
missing="$("$python" - <<'PY'
import importlib.util
names = ("diffusers", "transformers", "accelerate")
print(" ".join(name for name in names if importlib.util.find_spec(name) is None))
PY
)"
[[ -z "$missing" ]] || say "missing here: $missing; the rows of the VAE or T5 are left out"

# Threads that spin at barriers would wait for peers without a core, on a CPU that others use too.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
exec "$python" -m scripts.gpu_day "$@"
