#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the CUDA kernels in place, runs all tests, the
# memory and race checkers, and the benchmarks. Installs nothing and needs no network.
#
#   PYTHON                python that has torch and this package's dependencies (default python3)
#   OUT                   where the benchmarks' JSON goes (default benchmarks/results)
#   TORCH_CUDA_ARCH_LIST  architectures to build for (default: this machine's GPU)
#   PYTEST_ARGS           more arguments of the test run, such as: -m "not slow"
#
# Goes on after a failed step. Exits 1 if any failed; the summary at the end says which.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT" || exit 1
export PYTHONUNBUFFERED=1

summary=()
failed=0

# step NAME COMMAND...: runs it and keeps the outcome for the summary.
step() {
  local name=$1 start=$SECONDS outcome=ok
  shift
  printf '\n=== %s\n' "$name"
  "$@" || outcome="FAILED (exit $?)"
  [[ $outcome == ok ]] || failed=1
  summary+=("$(printf '%-28s %-18s %4d s' "$name" "$outcome" "$((SECONDS - start))")")
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
  GLANCE_EXT_CUDA=1 "$PYTHON" setup.py build_ext --inplace
}

run_tests() {
  local more=()
  [[ -z ${PYTEST_ARGS:-} ]] || eval "more=($PYTEST_ARGS)"
  "$PYTHON" -m pytest --continue-on-collection-errors "${more[@]}"
}

# sanitize TOOL COMMAND...: memory comes from the driver piece by piece, so that every overrun shows.
sanitize() {
  local tool=$1 program
  shift
  program=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer") || {
    echo "compute-sanitizer is not on PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin"
    return 127
  }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 "$@"
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

# bench SUITE DTYPE: measures, prints the table, writes the JSON and checks its form.
bench() {
  local suite=$1 dtype=$2 machine file
  machine=$(
    "$PYTHON" -c 'import torch; from glance_ext.bench.machine import machine_name
print(machine_name(torch.device("cuda")))'
  ) || return
  file="$OUT/$suite--$machine--$dtype.json"
  "$PYTHON" -m glance_ext bench "$suite" --device cuda --dtype "$dtype" --json "$file" || return
  "$PYTHON" -c 'import json, pathlib, sys; from glance_ext.bench import validate_results
path = pathlib.Path(sys.argv[1])
validate_results(json.loads(path.read_text(encoding="utf-8")), path.name)' "$file"
}

step "device" find_device
step "build" build
step "tests" run_tests
# Compilers' own kernels are not ours to check, and slow to.
step "memcheck: op tests" sanitize memcheck "$PYTHON" -m pytest tests/ops -m cuda -k "not compile"
step "memcheck: holes" holes memcheck
step "memcheck: windows" windows memcheck
step "racecheck: aggregation" race
step "racecheck: holes" holes racecheck --kernel-name kernel_substring=glance
step "initcheck: holes" holes initcheck --kernel-name kernel_substring=glance
step "racecheck: windows" windows racecheck --kernel-name kernel_substring=glance
step "initcheck: windows" windows initcheck --kernel-name kernel_substring=glance
# float32 may round the factors of its products to TF32, as torch's convolutions do by default.
for suite in ops partial-conv detect train; do
  for dtype in float32 bfloat16; do
    step "bench: $suite $dtype" bench "$suite" "$dtype"
  done
done

printf '\n=== summary\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
