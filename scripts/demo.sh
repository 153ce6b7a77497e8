#!/usr/bin/env bash
# Makes one small video with two processes on the CPU: scripts/demo.sh [flags of launch/infer.py...]
# The program prints the path of the video as its last line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cd "$ROOT"
ensure_venv .venv current

# Set here so that torchrun does not warn about choosing it; the program sizes its own thread pool.
export OMP_NUM_THREADS=1
# A free port on this machine's own loopback address: several demos may run side by side.
exec "$ROOT/.venv/bin/torchrun" --nproc_per_node 2 \
    --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:0 --local_addr 127.0.0.1 \
    launch/infer.py --config configs/embedded.yaml --save-dir samples/demo \
    --prompt "a red ball rolls to the right over a gray background" "$@"
