#!/usr/bin/env bash
# Everything that needs a GPU. Usage: scripts/gpu_suite.sh OUTDIR [STAGE...]
# Where no stage is named: tests switch prefill decode, which by estimate take 9 minutes together. Each other one may
# take as long alone: decode16 static throughput throughput_llama2 long batching chat int8 int4 cache8 mixture.
# A stage that fails, or has not ended after 9 minutes (tests: 4.5; or after LIMIT seconds of the environment), does not
# keep the next ones from running; they are named at the end. What has been measured until then is in OUTDIR.
# Without CUDA the tests skip and the rest runs tiny on the CPU, so that the script itself can be tried.
set -euo pipefail
default="tests switch prefill decode"
known="$default decode16 static throughput throughput_llama2 long batching chat int8 int4 cache8 mixture"
[ $# -ge 1 ] || { echo "usage: scripts/gpu_suite.sh OUTDIR [STAGE...] (stages: $known)" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
# shellcheck disable=SC2086 # several words
[ $# -ge 1 ] || set -- $default
for name in "$@"; do
    [[ " $known " == *" $name "* ]] || { echo "gpu_suite.sh: no stage '$name'; there is: $known" >&2; exit 2; }
done
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # the largest batch must not fail for fragments
export PYTHONUNBUFFERED=1 TQDM_DISABLE=1                # the logs hold all that was said until a stage was ended

bench() { # [ARGUMENT...]; results go into bench_DEVICE$suffix.json, of $shape if that is set
    local sizes=(${shape:+--shape "$shape"})
    if [ "$device" = cpu ]; then
        sizes=(--shape tiny --prompt 64 --new 8 --batches 1 --rounds 1)
    fi
    timeout -k 15 "${LIMIT:-540}" "$python" bench.py --device "$device" --out "$out/bench_$device${suffix:-}.json" "$@" "${sizes[@]}"
}

# By SIGINT pytest still says which tests have failed so far.
tests() {
    local several=()
    "$python" -c 'import xdist' 2>/dev/null && several=(-n "$(($(nproc) < 6 ? $(nproc) : 6))" --dist worksteal)
    timeout -s INT -k 15 "${LIMIT:-270}" "$python" -m pytest -v -m gpu -p no:cacheprovider "${several[@]}" tests/test_gpu.py
}
switch() { bench --stage switch; }
prefill() { bench --stage prefill; }
decode() { bench --stage decode --batches 1; }
decode16() { suffix=_16 bench --stage decode --batches 16; }
static() { suffix=_static bench --stage decode --batches 1 --peer static; } # transformers compiled takes minutes
throughput() { bench --stage throughput --plot "$out/throughput.png"; }
throughput_llama2() { shape=llama-2-7b suffix=_llama2 bench --stage throughput --plot "$out/throughput_llama2.png"; }
long() { suffix=_long bench --stage throughput --prompt 8192 --batches 1 --budget 1024 --plot "$out/long.png"; }
batching() { bench --stage batching; }
chat() { bench --stage chat; }
int8() { suffix=_int8 bench --stage decode --batches 1 --weights int8; }
int4() { suffix=_int4 bench --stage decode --batches 1 --weights int4; }
cache8() { suffix=_cache8 bench --stage throughput --cache-format int8 --plot "$out/throughput_cache8.png"; }
mixture() { # 8 of 48 layers: what a step of 1 and of 16 rows takes
    shape=qwen3-30b-a3b-8l
    suffix=_mixture bench --stage decode --batches 1
    suffix=_mixture_16 bench --stage decode --batches 16
}

failed=()
for name in "$@"; do
    echo "== $name on $device"
    "$name" 2>&1 | tee "$out/$name.log" || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] || { echo "gpu_suite.sh: failed: ${failed[*]}" >&2; exit 1; }
