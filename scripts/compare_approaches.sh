#!/bin/sh
# Whole slides against patches against small images, on the same synthetic slides; and spine at
# three resolutions. Trains all, then writes the comparison reports. Under 30 minutes on 2 cores.
#
#   scripts/compare_approaches.sh [UMTRAIN [FOLDER]]     default: umtrain comparison
set -eu
umtrain=${1:-umtrain}
folder=${2:-comparison}
mkdir -p "$folder"
# What has finished is kept: a second call goes on from there.
has() { [ -f "$folder/$1/report.html" ]; }

manifest=$folder/slides/manifest.csv
films=$folder/films/manifest.csv
[ -f "$manifest" ] || "$umtrain" data make dataset=wsi n=200 size=1536 out="$folder/slides"
[ -f "$films" ] || "$umtrain" data make dataset=spine n=200 size=2048 out="$folder/films"

fit() {
    name=$1
    shift
    has "$name" && return
    rm -rf "${folder:?}/$name" # what an interrupted run left
    "$umtrain" fit run_dir="$folder/$name" "$@"
}
fit whole_1024 dataset=wsi dataset.manifest="$manifest" res=1024
fit resized_512 dataset=wsi dataset.manifest="$manifest" res=512
fit two_stage dataset=wsi dataset.manifest="$manifest" approach=two_stage
"$umtrain" report "$folder/whole_1024" "$folder/resized_512" "$folder/two_stage" \
    out="$folder/slides_report"

"$umtrain" sweep dataset=spine dataset.manifest="$films" res=192,256,384 run_dir="$folder/spine"
"$umtrain" report "$folder/spine/res-192" "$folder/spine/res-256" "$folder/spine/res-384" \
    out="$folder/spine_report"
