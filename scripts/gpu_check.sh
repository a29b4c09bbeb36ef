#!/bin/sh
# Check every memory strategy on this machine's GPU, then measure throughput; prints one JSON.
#
# Needs torch, torchvision, numpy, cupy and cuda-bindings, and no network. Holds at most 8 GiB, or
# a quarter of what is free, of managed memory. Under 8 minutes.
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
