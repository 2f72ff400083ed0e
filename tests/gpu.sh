#!/usr/bin/env bash
# Everything that needs a GPU, with the machine's own python3 and no network: build, tests, sanitizer, benchmark.
# QUICK=1 leaves out the sanitizer's race check and the large shapes. Results: out/gpu, or $OUT where that is set.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
quick=${QUICK:-0}
failed=()

part() { # part NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" > "$out/$name.log" 2>&1
  local code=$?
  tail -n "${LINES_SHOWN:-4}" "$out/$name.log"
  echo "== $name: exit $code after $((SECONDS - start)) s"
  [ $code -eq 0 ] || failed+=("$name (exit $code)")
  return $code
}

capability=$($python -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") || {
  echo "gpu: torch sees no CUDA device" >&2
  exit 2
}
[ "$capability" = 9.0 ] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=$capability FORCE_CUDA=1

part build 300 $python setup.py build_ext --inplace || { tail -n 40 "$out/build.log"; exit 1; }
part info 60 $python -m consequentialism info
part check 60 $python -m consequentialism check
LINES_SHOWN=30 part tests $([ "$quick" = 1 ] && echo 90 || echo 200) \
  $python -m pytest -q -x --maxfail=20 -k "cuda or gpu" \
  --ignore tests/test_cuda_shim.py --ignore tests/test_cuda_factor.py --ignore tests/test_cuda_gram.py \
  --ignore tests/test_cuda_emend.py --ignore tests/test_cuda_weight_grad.py
part memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 9 $python tests/gpu_small.py
[ "$quick" = 1 ] || part racecheck 90 compute-sanitizer --tool racecheck --error-exitcode 9 $python tests/gpu_small.py
name=$($python -c "import torch; print('-'.join(torch.cuda.get_device_name().lower().split()))")
LINES_SHOWN=80 part bench 150 $python -m bench.gpu --out "$out/$name/gpu.csv" $([ "$quick" = 1 ] && echo --quick)
if [ ${#failed[@]} -gt 0 ]; then
  printf 'gpu: failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "gpu: all passed; commit $out/$name/gpu.csv as bench/results/$name/gpu.csv"
