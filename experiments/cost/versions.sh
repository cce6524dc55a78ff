#!/usr/bin/env bash
# soar.py, train.py and sample.py with other versions of torch and einops, each in an environment
# that is made, used and deleted: 8 GB of disk at most, as PyPI's torch comes with CUDA's libraries.
#
#     experiments/cost/versions.sh [TABLE]         writes a Markdown table, by default output/versions.md
#     VERSIONS="2.4.1 2.9.1" experiments/cost/versions.sh
#
# test_soar.py runs with all; three steps and four images of the shapes pipeline with torch 2.9 and
# newer. Everything else is as pinned in requirements.txt. Exit 1 where something failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
table=$(realpath -m "${1:-output/versions.md}")
work=${VERSIONS_WORK:-$(mktemp -d)}
pin() { cat requirements.txt experiments/requirements.txt 2>/dev/null | grep -E "^$1==" | head -1 | cut -d' ' -f1; }
torch_pin=$(pin torch) einops_pin=$(pin einops)
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1
mkdir -p "$work" "$(dirname "$table")"
model="--pretrained_model_name_or_path experiments/shapes/data/model --max_sequence_length 12"
model+=" --mixed_precision no"

install() { "$work/env/bin/python" -m pip install -q --no-cache-dir "$@" >"$work/pip.log" 2>&1; }

row() {  # exit status, what ran, with what: a row with the last line of its output
    local end
    end=$(tail -1 "$work/log" | tr '|' '/')
    [ "$1" = 0 ] || end="FAILED: $end"
    echo "| $installed | $3 | $2 | $end |" | tee -a "$table"
    if [ "$1" != 0 ]; then
        cp "$work/log" "${table%.md}-$installed-$3.log"
    fi
}

test_soar() {  # requirement of einops
    install "$1"
    "$work/env/bin/python" -m pytest -q -p no:cacheprovider test_soar.py >"$work/log" 2>&1
    row $? test_soar.py "$1"
}

train_and_sample() {
    local out="$work/out" status
    rm -rf "$out"
    grep -vE '^torch==' requirements.txt >"$work/rest.txt"
    if ! install -r "$work/rest.txt"; then
        cp "$work/pip.log" "$work/log"
        row 1 "pip install" requirements.txt
        return
    fi
    # shellcheck disable=SC2086
    "$work/env/bin/python" train.py $model --dataset experiments/shapes/data/train.parquet --resolution 64 \
        --output_dir "$out/train" --max_train_steps 3 --logging_steps 1 >"$work/log" 2>&1
    status=$?
    tail -1 "$out/train/metrics.jsonl" 2>/dev/null | cut -d, -f1,2 | tr -d '{"' >>"$work/log"
    row $status "train.py, three steps" requirements.txt
    # shellcheck disable=SC2086
    "$work/env/bin/python" sample.py $model --output_dir "$out/images" --height 64 --width 64 \
        --transformer "$out/train" --prompt "a photo of a red circle" >"$work/log" 2>&1
    status=$?
    find "$out/images" -path '*/samples/*.png' -size +0 2>/dev/null | wc -l >>"$work/log"
    row $status "sample.py, images" requirements.txt
}

{
    date -u "+%Y-%m-%d %H:%M UTC, commit $(git rev-parse --short HEAD), $(python3 -V), no GPU."
    printf '\n| torch | with | what ran | end |\n| --- | --- | --- | --- |\n'
} >"$table"
for version in ${VERSIONS:-2.4.1 2.9.1 2.11.0 ${torch_pin#torch==}}; do
    rm -rf "$work/env" && python3 -m venv "$work/env"
    install "torch==$version" "$(pin numpy)" "$(pin safetensors)" "$(pin pytest)" "$(pin hypothesis)"
    installed=$("$work/env/bin/python" -c 'import torch; print(torch.__version__)' 2>&1 | tail -1)
    test_soar einops==0.7.0
    test_soar "$einops_pin"
    if [ "$(printf '%s\n' 2.9 "$version" | sort -V | head -1)" = 2.9 ]; then
        train_and_sample
    fi
    rm -rf "$work/env"
done
! grep FAILED "$table"
