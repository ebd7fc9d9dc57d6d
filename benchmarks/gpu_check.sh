#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the CUDA kernels in place, runs all tests, the
# memory and race checkers, the benchmarks, and a profile. Installs nothing and needs no network.
#
#   PYTHON                python that has torch and this package's dependencies (default python3)
#   OUT                   where JSON and logs go (default benchmarks/results)
#   TORCH_CUDA_ARCH_LIST  architectures to build for (default: this machine's GPU)
#   PYTEST_ARGS           more arguments of the test runs, such as: -m "not slow"
#   PARTS                 which of "proof numbers profile rest" to do (default: all, in this order);
#                         rest is the tests that need no GPU
#   JOBS                  checks of the proof at a time (default 1); 6 take some 10 GB of the GPU
#   SECONDS_AT_MOST       when to end, in seconds (default: never): a step gets what is left, the
#                         proof no more than half; those without time are named at the end
#
# Goes on after a failed step. Exits 1 if any failed; the summary at the end says which, and
# $OUT/gpu-check.log keeps it with the end of each step's output.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
PARTS=${PARTS:-proof numbers profile rest}
JOBS=${JOBS:-1}
mkdir -p "$OUT" || exit 1
export PYTHONUNBUFFERED=1

logs=$(mktemp -d) || exit 1
trap 'rm -rf "$logs"' EXIT
names=()

until=${SECONDS_AT_MOST:-1000000}
left() {
  echo $((until - SECONDS))
}

# limited COMMAND...: ends it when the time is up. Under timeout it would not hear Ctrl-C.
limited() {
  if [[ -n ${SECONDS_AT_MOST:-} ]]; then
    timeout -k 10 "$(left)" "$@"
  else
    "$@"
  fi
}

# step NAME COMMAND...: runs it, shows its output, and keeps output and outcome.
step() {
  local name=$1 number=${#names[@]}
  names+=("$name")
  printf '\n=== %s\n' "$name"
  attempt "$number" "${@:2}" 2>&1 | tee "$logs/$number.log"
}

# beside NAME COMMAND...: the same beside others, JOBS at a time; together() shows the output.
beside() {
  local name=$1 number=${#names[@]}
  names+=("$name")
  while (($(jobs -rp | wc -l) >= JOBS)); do wait -n; done
  attempt "$number" "${@:2}" >"$logs/$number.log" 2>&1 &
  shown+=("$number")
}

shown=()
together() {
  local number
  wait
  for number in "${shown[@]}"; do
    printf '\n=== %s\n' "${names[$number]}"
    cat "$logs/$number.log"
  done
  shown=()
}

attempt() {
  local number=$1 start=$SECONDS outcome=ok code=0
  shift
  if (($(left) <= 0)); then
    outcome="no time left"
  else
    "$@" || code=$?
    ((code == 0)) || outcome="FAILED (exit $code)"
    ((code != 124 && code != 137)) || outcome="out of time"
  fi
  printf '%-18s %4d s' "$outcome" "$((SECONDS - start))" >"$logs/$number.outcome"
}

find_device() {
  "$PYTHON" - <<'EOF'
import torch

if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} finds no CUDA device")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
EOF
}

build() {
  if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
    TORCH_CUDA_ARCH_LIST=$(
      "$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'
    ) || return
    export TORCH_CUDA_ARCH_LIST
  fi
  GLANCE_EXT_CUDA=1 limited "$PYTHON" setup.py build_ext --inplace
}

# run_tests ARGUMENTS...: of pytest, before PYTEST_ARGS.
run_tests() {
  local more=()
  [[ -z ${PYTEST_ARGS:-} ]] || eval "more=($PYTEST_ARGS)"
  limited "$PYTHON" -m pytest --continue-on-collection-errors "$@" "${more[@]}"
}

# sanitize TOOL COMMAND...: memory comes from the driver piece by piece, so that every overrun shows.
sanitize() {
  local tool=$1 program
  shift
  program=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer") || {
    echo "compute-sanitizer is not on PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin"
    return 127
  }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$program" --tool "$tool" --error-exitcode 9 "$@"
}

# The backward of the aggregation is the op whose blocks share memory.
race() {
  sanitize racecheck "$PYTHON" -c '
import torch
from glance_ext.data.grid import patch_grid
from glance_ext.ops import aggregate_patch_scores

origins = patch_grid("paper", 9, 44).origins
for mode in ("mean", "gaussian", "max", "idw"):
    scores = torch.rand(2, len(origins), device="cuda", requires_grad=True)
    aggregate_patch_scores(scores, 9, 44, origins=origins, mode=mode).sum().backward()
    torch.cuda.synchronize()
    print(mode, float(scores.grad.sum()))
'
}

# A network of every layer that sees holes, forward and backward, with each kernel's dtypes, widths of
# channels (3, 16, 20, 72) and more cells than one tile; under any tool.
holes() {
  local tool=$1
  shift
  sanitize "$tool" "$@" "$PYTHON" -c '
import torch
from torch import nn
from glance_ext.nn import HoleFeatures, MaskedMaxPool2d, PartialConv2d

origins = torch.cartesian_prod(torch.arange(0, 44, 11), torch.arange(0, 44, 11))
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for tf32 in {False, dtype == torch.float32}:
        torch.backends.cudnn.allow_tf32 = tf32
        layers = [PartialConv2d(3, 16, 7, stride=2), nn.ReLU(), MaskedMaxPool2d(3, 2)]
        for size in ((16, 20, 3, 1, 1), (20, 72, 3, 2), (72, 130, 3)):
            layers += [PartialConv2d(*size), nn.LeakyReLU(0.1)]
        layers = nn.Sequential(*layers).to("cuda", dtype)
        shared = HoleFeatures(layers)
        images = torch.rand(2, 3, 61, 61, device="cuda", dtype=dtype, requires_grad=True)
        plan = shared.plan(61, 17, origins, device="cuda", dtype=dtype)
        features = shared(images, plan)
        features.sum().backward()
        torch.cuda.synchronize()
        print(dtype, "tf32" if tf32 else "", float(features.sum()), float(images.grad.sum()))
'
}

# Both paths of partial_conv2d, forward and backward, with the tiles of each dtype, groups, a depthwise
# convolution, strides, and a hole that leaves tiles empty; under any tool.
windows() {
  local tool=$1
  shift
  sanitize "$tool" "$@" "$PYTHON" -c '
import torch
from glance_ext.ops import partial_conv2d
from glance_ext.testing import partial_conv_path

sizes = ((3, 16, 7, 2, 1), (20, 36, 3, 1, 1), (64, 130, 3, 2, 1), (48, 48, 3, 1, 3), (16, 16, 3, 1, 16))
mask = torch.rand(2, 1, 40, 37, device="cuda") > 0.3
mask[..., :24, :30] = False
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for tf32 in {False, dtype == torch.float32}:
        torch.backends.cudnn.allow_tf32 = tf32
        for c, k, window, stride, groups in sizes:
            tensors = (torch.rand(2, c, 40, 37), torch.rand(k, c // groups, window, window), torch.rand(k))
            image, weight, bias = (t.to("cuda", dtype).requires_grad_() for t in tensors)
            for path in ("fused", "library"):
                with partial_conv_path(path):
                    nhwc = image.contiguous(memory_format=torch.channels_last)
                    output, valid = partial_conv2d(nhwc, mask, weight, bias, stride, 1, 1, groups, 0.1)
                    output.sum().backward()
                torch.cuda.synchronize()
                print(dtype, path, c, k, float(output.sum()), int(valid.sum()), float(image.grad.sum()))
                image.grad = weight.grad = bias.grad = None
'
}

# bench SUITE DTYPE OPTIONS...: measures, prints the table, writes the JSON and checks its form.
bench() {
  local suite=$1 dtype=$2 machine file
  shift 2
  machine=$(
    "$PYTHON" -c 'import torch; from glance_ext.bench.machine import machine_name
print(machine_name(torch.device("cuda")))'
  ) || return
  file="$OUT/$suite--$machine--$dtype.json"
  limited "$PYTHON" -m glance_ext bench "$suite" --device cuda --dtype "$dtype" --json "$file" "$@" ||
    return
  "$PYTHON" -c 'import json, pathlib, sys; from glance_ext.bench import validate_results
path = pathlib.Path(sys.argv[1])
validate_results(json.loads(path.read_text(encoding="utf-8")), path.name)' "$file"
}

# Kernels by stage, and what the counters say of each where Nsight Compute is there.
profile() {
  local images ncu file="$OUT/kernels.txt"
  for images in 1 16; do
    limited "$PYTHON" benchmarks/gpu_profile.py --images "$images" --dtype bfloat16 || return
  done | tee "$file" || return
  ncu=$(command -v ncu) || {
    echo "ncu is not on PATH: no counters"
    return 0
  }
  local metrics=gpu__time_duration.sum,sm__warps_active.avg.pct_of_peak_sustained_active
  metrics+=,sm__inst_executed_pipe_tensor.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,dram__bytes_read.sum,dram__bytes_write.sum,launch__registers_per_thread
  metrics+=,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
  limited "$ncu" --profile-from-start off --clock-control none --metrics "$metrics" --csv \
    --log-file "$OUT/counters.csv" \
    "$PYTHON" benchmarks/gpu_profile.py --images 16 --dtype bfloat16 --once
}

proof() {
  local all=$until
  ((until = SECONDS + $(left) / 2))
  # What a short training on photographs leaves finds on the GPU what it finds on the CPU.
  step "agreement" run_tests tests/engine/test_gpu_agreement.py -m cuda
  beside "tests: cuda" run_tests -m cuda --ignore tests/engine/test_gpu_agreement.py
  memcheck_tests "memcheck: hole ops" tests/ops/test_hole_windows*.py
  memcheck_tests "memcheck: partial_conv2d" tests/ops/test_partial_conv*.py
  memcheck_tests "memcheck: patch scores" tests/ops/test_patch*.py
  memcheck_tests "memcheck: contract" tests/ops/test_contract.py tests/ops/test_func.py tests/ops/test_winograd.py
  beside "memcheck: holes" holes memcheck
  beside "memcheck: windows" windows memcheck
  beside "racecheck: aggregation" race
  beside "racecheck: holes" holes racecheck --kernel-name kernel_substring=glance
  beside "initcheck: holes" holes initcheck --kernel-name kernel_substring=glance
  beside "racecheck: windows" windows racecheck --kernel-name kernel_substring=glance
  beside "initcheck: windows" windows initcheck --kernel-name kernel_substring=glance
  together
  until=$all
}

# memcheck_tests NAME FILES...: compilers' own kernels are not ours to check, and slow to.
memcheck_tests() {
  beside "$1" sanitize memcheck "$PYTHON" -m pytest "${@:2}" -m cuda -k "not compile"
}

# float32 may round the factors of its products to TF32, as torch's convolutions do by default.
numbers() {
  local suite dtype options=()
  for suite in detect ops train partial-conv; do
    # Compiling a layer of each shape takes longer than all that is measured.
    [[ $suite != partial-conv ]] || options=(--without nvidia-compiled)
    for dtype in bfloat16 float32; do
      step "bench: $suite $dtype" bench "$suite" "$dtype" "${options[@]}"
    done
  done
}

summarise() {
  local number outcome failed=0
  printf '\n=== summary of %s\n' "$(git describe --always --dirty 2>/dev/null || echo "no checkout")"
  for number in "${!names[@]}"; do
    outcome=$(cat "$logs/$number.outcome" 2>/dev/null || echo "FAILED (no outcome)")
    printf '%-28s %s\n' "${names[$number]}" "$outcome"
    [[ $outcome == ok* ]] || failed=1
  done
  return "$failed"
}

step "device" find_device
step "build" build
for part in $PARTS; do
  case $part in
    proof | numbers) "$part" ;;
    profile) step "profile" profile ;;
    rest) step "tests: rest" run_tests -m "not cuda" ;;
    *) step "part $part" false ;;
  esac
done
failed=0
summarise >"$logs/summary" || failed=1
cat "$logs/summary"
{
  cat "$logs/summary"
  for number in "${!names[@]}"; do
    printf '\n=== %s, its last lines\n' "${names[$number]}"
    tail -n 25 "$logs/$number.log"
  done
} >"$OUT/gpu-check.log"
exit "$failed"
