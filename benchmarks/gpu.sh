#!/usr/bin/env bash
# What only a GPU can show, on one card in at most ten minutes: the GPU tests, then one table (gpu.py).
#
#   benchmarks/gpu.sh                     figures to gpu_out/gpu.json; needs this repository and its environment only
#   OUT=/somewhere PYTHON=python3 benchmarks/gpu.sh --minutes 8
#
# An environment in which the packages can be imported is used as it is; else setup.sh makes one. Exit status 1 if a
# test or a part failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/train:$PWD/inference:$PWD/retrieval${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c "import torch, torchvision, ffcv, fastargs" 2>/dev/null; then source ./setup.sh; python=python; fi
out=${OUT:-gpu_out}
mkdir -p "$out"
failed=0
if "$python" -c "import pytest" 2>/dev/null; then      # stray: memory on a GPU that is not the process's own
  TORCH_CUDA_CHECK_STRAY_CONTEXT=error "$python" -m pytest -q -m gpu tests || failed=1
else
  echo "GPU tests not run: pytest is not installed"
fi
"$python" benchmarks/gpu.py --output "$out/gpu.json" "$@" || failed=1
exit $failed
