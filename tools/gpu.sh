#!/usr/bin/env bash
# Everything that needs a GPU, with the machine's own python3 and no network: build, tests, sanitizer, benchmark.
# QUICK=1 leaves out most tests, the sanitizer's race check and the large shapes. Under 9 minutes, quick 3: each part
# has its limit, and what is left of the whole is shared out. Results: out/gpu, or $OUT where that is set. Arguments are
# the benchmark's.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
quick=${QUICK:-0}
whole=$([ "$quick" = 1 ] && echo 175 || echo 530)
bench_seconds=$([ "$quick" = 1 ] && echo 50 || echo 180) # kept for the benchmark, whatever the rest takes
report=()
failed=0

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS left
  shift 2
  left=$((whole - SECONDS))
  [ "$name" = bench ] || left=$((left - bench_seconds))
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    report+=("FAIL  $name: no time was left for it")
    failed=1
    return 1
  fi
  echo "== $name, at most $limit s"
  timeout -k 10 "$limit" "$@" > "$out/$name.log" 2>&1
  local code=$? verdict=ok
  [ $code -eq 0 ] || { verdict=FAIL failed=1; }
  tail -n "$([ $code -eq 0 ] && echo 3 || echo 40)" "$out/$name.log"
  report+=("$(printf '%-5s %s: exit %d after %d s%s' "$verdict" "$name" $code $((SECONDS - start)) \
    "$([ $code -eq 124 ] && echo ', its limit')")")
  return $code
}

finish() {
  printf '\n'
  [ ! -s "$out/bench.log" ] || tail -n 80 "$out/bench.log"
  printf 'gpu: %s\n' "${report[@]}" "$([ $failed = 0 ] && echo "all passed" || echo "FAILED") in $SECONDS s"
  exit $failed
}

capability=$($python -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())" 2> "$out/device.err") || {
  echo "gpu: torch sees no CUDA device: $(tail -n 1 "$out/device.err")" >&2
  exit 2
}
rm -f "$out/device.err" "$out/bench.log"
export TORCH_CUDA_ARCH_LIST=$capability FORCE_CUDA=1

part build 200 $python setup.py build_ext --inplace || finish
part info 30 $python -m consequentialism info
part check 40 $python -m consequentialism check

# By file: those that the host shim runs need no device. By name: the backends' cases are called cuda and triton.
mapfile -t of_the_shim < <(grep -lE '^(import|from) cuda_shim' tests/test_*.py)
selection=(-q --maxfail 20 -k "(cuda or gpu) and not triton" "${of_the_shim[@]/#/--ignore=}")
[ "$quick" = 1 ] && selection+=(tests/test_gpu_contracts.py tests/test_gpu_fused_weight_grad.py tests/test_ops.py tests/test_cuda_build.py)
$python -c "import xdist" 2> /dev/null && selection+=(-n 6)
part tests "$([ "$quick" = 1 ] && echo 60 || echo 180)" $python -m pytest "${selection[@]}"
# Each shape of arguments is compiled once, a second or more, so the shared cases of few files.
triton=(-q --maxfail 20 -k "triton and True" tests/test_identities.py tests/test_linear.py)
[ "$quick" = 1 ] && triton=(-q -k triton tests/test_linear.py::test_options_reach_the_gradient)
$python -c "import xdist" 2> /dev/null && triton+=(-n 6)
part triton "$([ "$quick" = 1 ] && echo 30 || echo 90)" $python -m pytest "${triton[@]}"

# Our own kernels alone; without torch's cache every tensor is an allocation whose ends are watched.
sanitize() { # sanitize TOOL SECONDS
  part "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --kernel-regex kns=consequentialism $python tools/gpu_small.py
}
sanitize memcheck 60
[ "$quick" = 1 ] || sanitize racecheck 90

name=$($python -c "from bench.environment import slug; print(slug('cuda'))")
# A case that is begun in time is given 8 s more; then what there is is written.
part bench $bench_seconds $python -m consequentialism bench --device cuda --out "$out/$name/step_cost.csv" \
  --plot "$out/$name" --seconds $((bench_seconds - 20)) $([ "$quick" = 1 ] && echo --quick) "$@"
[ ! -s "$out/$name/step_cost.csv" ] || report+=("      commit $out/$name/step_cost.csv in bench/results/$name")
finish
