#!/usr/bin/env bash
# What only a GPU can show, without a network: run from the repository root.
#
#   OUT=folder benchmarks/gpu.sh [cuda|cpu] [STEP...]
#
# Steps that are joined by + run side by side. By default `tokens+slim+patches trained`, under 9 minutes; `speed` stands
# for what the spine and the mixers cost and the tests that need a GPU, under 9 minutes too; `search` for what a search
# is worth at 300 epochs, ten minutes at a time; what they did not reach the same command goes on with. Each step has a time limit of
# its own and stops nobody else. Results and logs are copied into $OUT as they grow; networks stay in $WORK. The same
# command goes on from what $WORK has.
#
# What the machine lacks lies in `.gpu/`: data/ (CIFAR-10 as parquet, or a part), weights.safetensors (of the ViT-S/14 of
# evidence_recovery.py) and wheels/, which `python benchmarks/gpu_pack.py` makes; a step without its part is left out and says
# so. `cpu` rehearses all steps with tiny sizes.
set -uo pipefail
device=cuda
case "${1:-}" in cuda | cpu) device=$1; shift ;; esac
out=${OUT:-runs/gpu} work=${WORK:-/tmp/gpu-work}
mkdir -p "$out" "$work/logs"
out=$(realpath "$out") work=$(realpath "$work")
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 HF_HOME=$work/hf TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
for data in .gpu/data shared/data/cifar10-jpeg ../shared/data/cifar10-jpeg; do [ -d "$data" ] && break; done
data=$(realpath "$data")
weights=${WEIGHTS:-.gpu/weights.safetensors}

if ls .gpu/wheels/*.whl >/dev/null 2>&1; then
  site=/tmp/site-gpu
  "$python" -m pip install -q --no-index --no-deps --no-warn-conflicts --target "$site" --upgrade .gpu/wheels/*.whl &&
    export PYTHONPATH=$PWD:$site
fi

collect() { # copies results; a folder that is brought back may hold few files
  local name
  for name in spine throughput mixers; do [ -s "$work/$name.csv" ] && cp "$work/$name.csv" "$out"; done
  for name in tokens.csv tokens_latency.csv; do [ -s "$work/tokens/$name" ] && cp "$work/tokens/$name" "$out"; done
  [ -s "$work/slim.jsonl" ] && cp "$work/slim.jsonl" "$out"
  [ -s "$work/fold.jsonl" ] && cp "$work/fold.jsonl" "$out"
  [ -s "$work/patches/patches.json" ] && cp "$work/patches/patches.json" "$out"
  [ -s "$work/search/evidence_search.jsonl" ] && cp "$work/search/evidence_search.jsonl" "$out"
  cat "$work"/trained/slim_trained-*.jsonl >"$out/slim_trained.jsonl" 2>/dev/null || rm -f "$out/slim_trained.jsonl"
  for name in "$work"/logs/*.log; do [ -s "$name" ] && echo "== $(basename "$name")" && tail -c 60000 "$name"; done >"$out/logs.txt"
} 2>/dev/null

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * patience)) start=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$work/logs/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - start)) s" | tee -a "$out/steps.txt"
  tail -n "${shown:-15}" "$work/logs/$name.log"
  collect
}

pruning=$("$python" -c 'import os, torch_pruning; print("--torch-pruning", os.path.dirname(os.path.dirname(torch_pruning.__file__)))' 2>/dev/null)

if [ "$device" = cuda ]; then
  export OMP_NUM_THREADS=4
  patience=1 precision=bf16 rounds=7 seconds=0.5 tokens="1024 4096"
  training="--train-images 10240 --epochs 3 --batch 256 --workers 12 --compile"
  token_sizes="--keeps 0.9 0.7 0.5 --tune-keeps 0.7 --epochs 6 --seconds 200"
  fold_sizes="--seeds 3 --images 1536 --answers 0.25"
  slim_sizes="--seconds 25 --seeds 2 --workers 4 --train-images 20000"
  trained_sizes="--base-seconds 52 --recover-seconds 16 --workers 4"
  search_sizes="--size large" processes=16
  patch_sizes="--dataset hfds/$data --image-size 32 --patch 4 --dim 192 --depth 6 --heads 6 --hidden 768 --batch 512 --epochs 15 --tune-epochs 3 --lr 1e-3 --shares 55"
else
  patience=4 precision=fp32 rounds=1 seconds=0.01 tokens=64
  training="--size micro --train-images 64 --epochs 2 --batch 16 --workers 0 --compile"
  token_sizes="--tiny --seeds 1 --keeps 0.7 --tune-keeps 0.7"
  fold_sizes="--tiny --seeds 1 --settings fold none"
  slim_sizes="--tiny --seeds 1 --seconds 1"
  trained_sizes="--size tiny --base-seconds 3 --recover-seconds 2"
  search_sizes="--size tiny" processes=2
  patch_sizes="--dim 16 --depth 3 --heads 2 --hidden 32 --patch 5 --epochs 1 --tune-epochs 1 --block-epochs 1 --images 32 --seeds 0 --shares 55"
fi

shared() { # shared COMMAND...: run it while processes share the GPU without waiting for their turns, where there is CUDA's server for that
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/vitnas-mps CUDA_MPS_LOG_DIRECTORY=/tmp/vitnas-mps
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY"
  local try='import torch; print(float(torch.ones(2, device="cuda").sum()))'
  if [ "$device" = cuda ] && nvidia-cuda-mps-control -d && timeout 60 "$python" -c "$try"; then
    echo "processes share the GPU by MPS" | tee -a "$out/steps.txt"
    "$@"
    echo quit | timeout 20 nvidia-cuda-mps-control
  else
    echo quit | timeout 20 nvidia-cuda-mps-control 2>/dev/null
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    echo "processes take turns" | tee -a "$out/steps.txt"
    "$@"
  fi
}

search() { # one process per run, the longest and the most wanted first
  local command=("$python" benchmarks/evidence_search.py --dataset "hfds/$data" --out "$work/search" --device "$device" $search_sizes)
  jobs_of() {
    local seed
    for seed in 0 1 2; do echo "near-$seed --arms near --seeds $seed"; done
    for arm in guided mixers vit_resnas; do for seed in 0 1 2; do echo "$arm-$seed --arms $arm --seeds $seed"; done; done
    for share in 0 1 2 3; do echo "ranked-$share --arms ranked --share $share/4"; done
    for arm in halving autoformer vitas; do for seed in 0 1 2; do echo "$arm-$seed --arms $arm --seeds $seed"; done; done
  }
  all() {
    export OMP_NUM_THREADS=1 shown=2
    while read -r name words; do
      while [ "$(jobs -rp | wc -l)" -ge "$processes" ]; do wait -n; done
      step "search-$name" 580 "${command[@]}" $words &
    done < <(jobs_of)
    wait
    step search-rank 120 "${command[@]}" --arms rank
  }
  shared all
}

run() { # run STEP: one step by name
  case $1 in
  speed) for each in environment host spine training mixers tests; do run "$each"; done ;;
  environment) step environment 30 "$python" -c 'from vitnas.measure.environment import environment; print(environment())' ;;
  host) step host 60 "$python" benchmarks/spine.py --device "$device" --rounds "$rounds" --out "$work/spine.csv" --only host host_tiny host_fresh ;;
  spine) step spine 90 "$python" benchmarks/spine.py --device "$device" --rounds "$rounds" --out "$work/spine.csv" --only supernet fresh several scoring relative masked gathered ;;
  training) step training 180 "$python" benchmarks/throughput.py --dataset "hfds/$data" --device "$device" --precision "$precision" $training --out "$work/throughput.csv" ;;
  mixers) step mixers 80 "$python" benchmarks/mixers.py --device "$device" --tokens $tokens --seconds "$seconds" --out "$work/mixers.csv" ;;
  tests) step tests 90 "$python" -m pytest -q -m gpu -p no:cacheprovider -o addopts= -o timeout=0 ;;
  tokens) step tokens 225 "$python" benchmarks/evidence_tokens.py --dataset "hfds/$data" --out "$work/tokens" --device "$device" --parts train tune $token_sizes ;;
  slim) [ -f "$weights" ] || { echo "slim: left out, there is no $weights" | tee -a "$out/steps.txt"; return; }
    step slim 240 "$python" benchmarks/evidence_recovery.py --weights "$weights" --dataset "hfds/$data" --out "$work/slim.jsonl" --device "$device" $slim_sizes $pruning ;;
  fold) [ -f "$weights" ] || { echo "fold: left out, there is no $weights" | tee -a "$out/steps.txt"; return; }
    step fold 240 "$python" benchmarks/evidence_slim.py --weights "$weights" --dataset "hfds/$data" --out "$work/fold.jsonl" --device "$device" $fold_sizes $pruning ;;
  patches) mkdir -p "$work/patches"; step patches 225 "$python" benchmarks/evidence_patches.py --out "$work/patches/patches.json" --device "$device" --precision "$precision" $patch_sizes ;;
  trained) # one process per seed
    for seed in 0 1 2; do
      step "trained-$seed" 250 "$python" benchmarks/evidence_slim_trained.py --dataset "hfds/$data" --out "$work/trained" --device "$device" --seeds $seed $trained_sizes $pruning &
    done
    wait ;;
  search) search ;;
  *) echo "there is no step $1" | tee -a "$out/steps.txt" ;;
  esac
}

(while sleep 10; do collect; done) &
copying=$!
[ $# -gt 0 ] || set -- tokens+slim+patches trained
for group in "$@"; do
  names=(${group//+/ })
  pids=()
  for name in "${names[@]}"; do run "$name" & pids+=($!); done
  wait "${pids[@]}"
done
kill $copying
collect
