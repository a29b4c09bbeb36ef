#!/usr/bin/env bash
# The demo: synthetic slides as real files, a ResNet-50 trained on them whole, its evaluation.
# Usage: scripts/demo.sh path/to/umtrain FOLDER. What an earlier demo left in FOLDER is replaced.
set -euo pipefail
umtrain=$1 folder=$2
case $folder in /*|*..*) echo "name a folder below the checkout" >&2; exit 2 ;; esac
rm -rf -- "$folder"
mkdir -p "$folder"
"$umtrain" data make dataset=wsi n=240 size=768 out="$folder/slides"
"$umtrain" fit dataset=wsi res=512 epochs=3 dataset.manifest="$folder/slides/manifest.csv" run_dir="$folder/run"
"$umtrain" eval run="$folder/run"
echo
echo "Open $PWD/$folder/run/report.html"
