#!/usr/bin/env bash
# Makes a video of two seconds with two processes on the CPU, and a page with three frames of it:
# scripts/demo.sh [flags of launch/infer.py...]
# Opens the page where there is a desktop. The last lines on standard output are the paths of both.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cd "$ROOT"
ensure_venv .venv current

open_page() { # FILE; quietly, and beside what follows
    [[ -t 1 && -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]] && command -v xdg-open >/dev/null || return 0
    xdg-open "$1" >/dev/null 2>&1 </dev/null &
}

# Set here so that torchrun does not warn about choosing it; the program sizes its own thread pool.
export OMP_NUM_THREADS=1
sheet=samples/demo/sheet.html
rm -f "$sheet"
# A free port on this machine's own loopback address: several demos may run side by side.
"$ROOT/.venv/bin/torchrun" --nproc_per_node 2 \
    --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:0 --local_addr 127.0.0.1 \
    launch/infer.py --config configs/embedded.yaml --image-size 144 256 --num-frames 51 \
    --save-dir samples/demo --sheet \
    --prompt "a red ball rolls to the right over a gray background" "$@"
# Flags may have put it elsewhere; the program has said where.
[[ ! -e "$sheet" ]] || open_page "$sheet"
