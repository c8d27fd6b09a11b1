#!/usr/bin/env bash
# Everything that wants a machine with an accelerator: is it usable, does it compute what it must, does it train as the
# CPU does, how fast is it. Usage, from the repository's root: benchmarks/on_gpu.sh [BACKEND [FOLDER]]
#
# All output goes to FOLDER; a part that fails does not stop the others. Exit code 1 if one failed.
#   PARTS="check-env validate"   only these parts
#   TINY="data.total_steps=20"   more settings of the tiny_moe4 runs, separated by spaces
#   SLICE="model.num_layers=1"   more settings of the runs of two layers of 7b_moe4 (30 GiB on device and host)
#   PYTHON, NPROC, LAYERS, CHECKPOINT: as benchmarks/gpu.sh takes them
set -uo pipefail

backend=${1:-auto}
folder=${2:-gpu-results}
python=${PYTHON:-python}
all="check-env validate tests tiny_moe4 7b_moe4-slice bisect benchmarks"
parts=${PARTS:-$all}
failed=()
mkdir -p "$folder"

step() { # step NAME COMMAND…: run it, keep its output and its exit code
    local name=$1
    shift
    echo "+ $*"
    "$@" 2>&1 | tee "$folder/$name.log"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        failed+=("$name (exit code $code)")
    fi
    return "$code"
}

portmoe() { "$python" -m portmoe "$@"; }

same_run() { # same_run NAME CONFIG SETTING…: train on the CPU and on the backend, and compare
    local name=$1 config=$2 set=() setting device
    shift 2
    for setting in "$@"; do set+=(--set "$setting"); done
    for device in cpu "$backend"; do
        step "$name-train-$device" portmoe train --config "$config" --backend "$device" "${set[@]}" \
            --set ckpt.enable_save_ckpt=false --set "run.directory=$folder/$name/$device" || return
        [ "$device" != "$backend" ] || break
    done
    if [ "$backend" != cpu ]; then
        step "$name-compare" portmoe compare "$folder/$name/cpu" "$folder/$name/$backend" --out "$folder/$name.html"
    fi
}

run_part() {
    case $1 in
    check-env)
        step check-env portmoe check-env --backend "$backend"
        portmoe check-env --backend "$backend" --json >"$folder/check-env.json"
        ;;
    validate) step validate portmoe validate --backend "$backend" --out "$folder/validate" ;;
    tests) step tests "$python" -m pytest -n 0 -m "" tests/cuda --junitxml "$folder/tests.xml" ;;
    tiny_moe4) same_run tiny_moe4 tiny_moe4 ${TINY:-} ;;
    7b_moe4-slice)
        same_run 7b_moe4-slice 7b_moe4 model.num_layers=2 model.dtype=float32 data.micro_bsz=1 data.micro_num=1 \
            data.total_steps=5 data.valid_every=0 ${SLICE:-}
        ;;
    bisect) step bisect portmoe bisect --reference cpu --backend "$backend" --out "$folder/bisect.json" ;;
    benchmarks) step benchmarks benchmarks/gpu.sh "$backend" "$folder/benchmarks" ;;
    *)
        echo "error: PARTS names $1; there are: $all" >&2
        exit 2
        ;;
    esac
}

for part in $parts; do
    echo "== $part"
    run_part "$part"
done

echo "== results in $folder"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "everything passed"
