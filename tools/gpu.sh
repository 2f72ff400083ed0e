#!/usr/bin/env bash
# Everything that needs a GPU, with the machine's own python3 and no network, in two calls of under ten minutes each:
#
#   tools/gpu.sh first   build, first contact of each kernel, sanitizer, device tests, the inverse's times
#   tools/gpu.sh bench   the benchmark: own kernels first, profile, convolutions, Triton and compiled last
#
# Results: at most 8 files in $OUT, by default out/gpu, written as they come. A line for each part as soon as it is over;
# exit code 1 if a part failed or had no time. DEVICE=cpu rehearses the script without a GPU. Where `make gpu-pack` has
# put an extension in the checkout, nothing is compiled.
#
# SECONDS_ALLOWED=N cuts a call short: parts that come when its time is over are named and counted as failed. A machine
# that is to be had for 900 s in all is enough for `first` whole, 580 s, and, with 50 s for its start, for
# `SECONDS_ALLOWED=270 tools/gpu.sh bench`: its first two parts.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-out/gpu} PYTHONPATH=$PWD PYTHONUNBUFFERED=1 FORCE_CUDA=1
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
whole=${SECONDS_ALLOWED:-580}
log=$OUT/log.txt
failed=0
mkdir -p "$OUT"

allot() { # allot NAME SECONDS LEAST: `limit` is SECONDS or what is left of the call; a failure where that is below LEAST
  limit=$2
  [ "$limit" -le $((whole - SECONDS)) ] || limit=$((whole - SECONDS))
  [ "$limit" -lt "$3" ] || return 0
  echo "gpu: FAIL  $1: no time was left for it"
  failed=1
  return 1
}

part() { # part NAME SECONDS COMMAND...: its output goes to the log
  local name=$1 limit start=$SECONDS code verdict=ok
  allot "$name" "$2" 5 || return
  shift 2
  printf '\n== %s\n' "$name" >> "$log"
  timeout -k 5 "$limit" "$@" >> "$log" 2>&1
  code=$?
  [ $code -eq 0 ] || { verdict=FAIL failed=1; }
  printf 'gpu: %-5s %s: exit %d after %d s%s\n' "$verdict" "$name" $code $((SECONDS - start)) \
    "$([ $code -eq 124 ] && echo ', its limit')" | tee -a "$log"
  return $code
}

finish() {
  echo "gpu: $([ $failed = 0 ] && echo "all passed" || echo FAILED) in $SECONDS s, $(ls "$OUT" | wc -l) files in $OUT"
  exit $failed
}

# Our own kernels alone, a process a kind; without torch's cache every tensor is an allocation whose ends are watched.
# A capture needs that cache, and a free without it waits for all streams: graph, streams and side_stream keep it.
sanitize() { # sanitize TOOL SECONDS KIND...
  local tool=$1 limit start=$SECONDS folder kind uncached pids=() bad=0
  allot "$tool" "$2" 5 || return
  shift 2
  folder=$(mktemp -d)
  for kind; do
    uncached=(PYTORCH_NO_CUDA_MEMORY_CACHING=1)
    case $kind in graph | streams | side_stream) uncached=(-u PYTORCH_NO_CUDA_MEMORY_CACHING) ;; esac
    env "${uncached[@]}" timeout -k 5 "$limit" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --print-limit 3 --kernel-regex kns=consequentialism \
      "$python" tools/gpu_first.py --here --device "$device" --repeats "${REPEATS:-3}" "$kind" > "$folder/$kind" 2>&1 &
    pids+=($!)
  done
  for kind; do
    wait "${pids[0]}" || { bad=$((bad + 1)); echo "gpu:       $tool of $kind: FAIL"; }
    pids=("${pids[@]:1}")
  done
  tail -n 25 "$folder"/* > "$OUT/$tool.txt"
  rm -r "$folder"
  [ $bad = 0 ] || failed=1
  echo "gpu: $([ $bad = 0 ] && echo 'ok   ' || echo 'FAIL ') $tool: $bad bad of $# kinds after $((SECONDS - start)) s"
}

first_contact() { # first_contact SECONDS: a line for each call as soon as it is known
  local limit
  allot "first contact" "$1" 5 || return
  timeout -k 5 "$limit" "$python" tools/gpu_first.py --device "$device" --seconds 45 2>&1 | tee "$OUT/first.txt"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
}

bench() { # bench NAME SECONDS ARGUMENT...: rows to $OUT/NAME.csv
  local name=$1 limit start_and_end=20
  allot "bench $name" "$2" $((start_and_end + 5)) || return
  shift 2
  part "bench $name" "$limit" "$python" -m consequentialism bench --device "$device" --seconds $((limit - start_and_end)) \
    --out "$OUT/$name.csv" "$@"
}

if [ "$device" = cuda ]; then
  capability=$($python -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())" 2> "$log") || {
    echo "gpu: torch sees no CUDA device: $(tail -n 1 "$log")" >&2
    exit 2
  }
  export TORCH_CUDA_ARCH_LIST=$capability
fi
if ! $python -c "import sys, consequentialism.ops as o; sys.exit('$device' not in o.device_types)" 2> /dev/null; then
  part build 200 "$python" setup.py build_ext --inplace || { tail -n 40 "$log"; finish; }
fi

case ${1:-} in
  first)
    part info 15 "$python" -m consequentialism info
    first_contact 150
    sanitize memcheck 75 gram_primal gram_split gram_warpgroups_primal conv_gram conv_gram_pieces \
      conv_gram_displaced_pieces inverse_block_big inverse_teams inverse_cluster inverse_cluster_large apply_dual \
      apply_primal bias_poison recompute cooperative repeat graph streams side_stream
    sanitize racecheck 80 gram_dual conv_gram conv_gram_displaced_pieces inverse_block inverse_block_big \
      inverse_cluster apply_primal recompute cooperative repeat graph streams
    sanitize synccheck 40 repeat graph streams
    # A dead context ends its worker: conftest.py sees to that, and xdist starts another.
    part tests 125 "$python" -m pytest -v -n 8 --timeout 45 --timeout-method thread -p no:cacheprovider \
      tests/test_gpu_fused_weight_grad.py tests/test_gpu_contracts.py tests/test_gpu_side_stream.py -k "not opcheck"
    grep -E 'FAILED|Timeout|crashed' "$log" | cut -c1-150 | sort -u | tail -n 25
    part check 35 "$python" -m consequentialism check --backend "$([ "$device" = cuda ] && echo cuda || echo cpu)"
    bench inverse 45 --op damped_inverse --op fused_weight_grad --dtype float32 --provider consequentialism \
      --provider block --provider cluster --provider recompute --provider cooperative
    ;;
  bench)
    own=(--provider consequentialism --provider stock --provider fused --provider batched)
    bench whole 150 --op linear --op step --op mlp --op deep "${own[@]}"
    bench parts 130 --op fused_weight_grad --op damped_inverse --op damped_inverses --op input_gram --op emended_input \
      --op weight_grad --provider consequentialism --provider warps --provider warpgroups --provider recompute \
      --provider cooperative --provider block --provider cluster --provider cholesky_ex --provider batched
    if command -v ncu > /dev/null; then
      part ncu 70 ncu --clock-control none --set full -c 24 --page details --log-file "$OUT/ncu.txt" \
        -k "regex:inverse|fused_weight|gram|emended_input|bias_grad" \
        "$python" tools/gpu_first.py --here --device "$device" --type bfloat16 \
        gram_large gram_warpgroups conv_gram_large inverse_cluster apply_large cooperative
    fi
    if [ "$device" = cuda ] && command -v nvcc > /dev/null; then
      part cycles 30 "$python" tools/cuda_cycles.py --run && grep -E ' measured .* counted ' "$log"
    fi
    bench conv 60 --op conv2d --provider consequentialism --provider direct --provider displaced --provider triton
    bench half 40 --op weight_grad --op linear --dtype float16 --provider consequentialism --provider plain
    bench others 75 --op linear --dtype bfloat16 --provider triton --provider compiled
    grep -E '^(met|MISSED|no time|PROBLEM)' "$log" | cut -c1-150
    ;;
  *)
    echo "gpu: the call must be 'first' or 'bench', got '${1:-}'" >&2
    exit 2
    ;;
esac
finish
