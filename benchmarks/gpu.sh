#!/usr/bin/env bash
# What only a GPU can show, in under 9 minutes, without a network: run from the repository root.
#
#   OUT=folder benchmarks/gpu.sh [cuda|cpu]
#
# Each step has a time limit of its own, writes its results and its log into $OUT as it goes, and stops nobody else.
# Wheels in `.whl/` are used for packages that the machine lacks. `cpu` rehearses all steps with tiny sizes.
set -uo pipefail
device=${1:-cuda}
out=${OUT:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD
python=${PYTHON:-python3}
data=shared/data/cifar10-jpeg
[ -d "$data" ] || data=../shared/data/cifar10-jpeg
data=$(realpath "$data")

if ls .whl/*.whl >/dev/null 2>&1; then
  "$python" -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl && export PYTHONPATH=$PWD:/tmp/site
fi

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - start)) s" | tee -a "$out/steps.txt"
  tail -n 15 "$out/$name.log"
}

if [ "$device" = cuda ]; then
  rounds=7 precision=bf16 seconds=0.5 tokens="1024 4096"
  training="--train-images 20000 --epochs 3 --batch 256 --workers 12"
else
  rounds=1 precision=fp32 seconds=0.01 tokens=64
  training="--size micro --train-images 64 --epochs 2 --batch 16 --workers 0"
fi

step environment 30 "$python" -c 'from vitnas.measure.environment import environment; print(environment())'
step host 60 "$python" benchmarks/spine.py --device "$device" --rounds "$rounds" --out "$out/spine.csv" --only host host_tiny host_fresh
step spine 90 "$python" benchmarks/spine.py --device "$device" --rounds "$rounds" --out "$out/spine.csv" --only supernet fresh several scoring relative masked gathered
step training 180 "$python" benchmarks/throughput.py --dataset "hfds/$data" --device "$device" --precision "$precision" $training --out "$out/throughput.csv"
step mixers 80 "$python" benchmarks/mixers.py --device "$device" --tokens $tokens --seconds "$seconds" --out "$out/mixers.csv"
step tests 90 "$python" -m pytest -q -m gpu -p no:cacheprovider -o addopts= -o timeout=0
