#!/usr/bin/env bash
# What only a GPU can show, on one card in at most ten minutes: the GPU tests, then one table (gpu.py).
#
#   benchmarks/gpu.sh                     figures to gpu_out/gpu.json; needs this repository and its environment only
#   OUT=/somewhere PYTHON=python3 benchmarks/gpu.sh --minutes 8
#
# PYTHON is used as it is (to install what it lacks: PYTHON=... ./setup.sh), and so is an environment in which the
# packages can be imported; else setup.sh makes one. Exit status 1 if a test or a part failed, was stopped, or found no
# time left.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/train:$PWD/inference:$PWD/retrieval${PYTHONPATH:+:$PYTHONPATH}
if [ -z "${PYTHON:-}" ] && ! python3 -c "import torch, torchvision, ffcv, fastargs, faiss, pytest" 2>/dev/null; then
  source ./setup.sh
  python=python
fi
out=${OUT:-gpu_out}
mkdir -p "$out"
exec "$python" benchmarks/gpu.py --output "$out/gpu.json" "$@"
