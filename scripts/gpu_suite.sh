#!/usr/bin/env bash
# Everything that needs a GPU. Usage: scripts/gpu_suite.sh OUTDIR [STAGE...]; without a stage, all of them (9 minutes at most).
# On a machine without CUDA the tests skip and the benchmark runs on the CPU, so that the script itself can be tried.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')

tests() { # the GPU tests
    "$python" -m pytest -q -m gpu -p no:cacheprovider 2>&1 | tee "$out/gpu_tests.log"
}

decode() { # decode speed against transformers, embedded checkpoint
    "$python" scripts/bench_decode.py --device "$device" --out "$out/decode_$device.json" 2>&1 | tee "$out/decode.log"
}

for stage in "${@:-tests decode}"; do
    for name in $stage; do
        declare -F "$name" >/dev/null || { echo "gpu_suite.sh: no stage '$name'; there is: tests decode" >&2; exit 2; }
        echo "== $name on $device"
        "$name"
    done
done
