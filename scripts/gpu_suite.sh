#!/usr/bin/env bash
# Everything that needs a GPU. Usage: scripts/gpu_suite.sh OUTDIR [STAGE...]
# Each stage takes 9 minutes at most, and so do those that run where none is named: tests decode switch prefill.
# Only when named: throughput throughput_llama2 long compile attention.
# Without CUDA the tests skip and the rest runs tiny on the CPU, so that the script itself can be tried.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # the largest batch must not fail for fragments

bench() { # NAME [ARGUMENT...]: what bench.py prints goes to NAME.log, its results into one file
    local name=$1 small=()
    shift
    if [ "$device" = cpu ]; then
        small=(--shape tiny --prompt 64 --new 8 --batches 1 --rounds 1)
    elif [ -n "${shape:-}" ]; then
        small=(--shape "$shape")
    fi
    "$python" bench.py --device "$device" --out "$out/bench_$device${suffix:-}.json" "$@" "${small[@]}" |
        tee "$out/$name.log"
}

tests() { "$python" -m pytest -q -m gpu -p no:cacheprovider 2>&1 | tee "$out/tests.log"; }
decode() { bench decode --stage decode --profile "$out/profile.txt"; }
switch() { bench switch --stage switch; }
prefill() { bench prefill --stage prefill; }
throughput() { bench throughput --stage throughput --plot "$out/throughput.png"; }
throughput_llama2() { shape=llama-2-7b suffix=_llama2 bench throughput_llama2 --stage throughput --plot "$out/throughput_llama2.png"; }
long() { bench long --stage long --plot "$out/long.png"; }
compile() { bench compile --stage compile; }
attention() { bench attention --stage attention; }

known="tests decode switch prefill throughput throughput_llama2 long compile attention"
for stage in "${@:-tests decode switch prefill}"; do
    for name in $stage; do
        [[ " $known " == *" $name "* ]] || { echo "gpu_suite.sh: no stage '$name'; there is: $known" >&2; exit 2; }
        echo "== $name on $device"
        "$name"
    done
done
