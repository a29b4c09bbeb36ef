#!/usr/bin/env bash
# Trains for hours with kills, spilling and a live sweep beside it, and prints what was left behind.
# Usage: scripts/soak.sh [minutes, default 120] [folder for the picture, default scripts/results]
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" scripts/soak.py --minutes "${1:-120}" --picture "${2:-scripts/results}/soak.png"
