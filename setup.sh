#!/usr/bin/env bash
# Creates the environment for demo.sh and test.sh if it does not exist yet. Safe to run again.
#
#   ./setup.sh                        a virtual environment .venv, with the pinned packages
#   PYTHON=/path/to/python ./setup.sh    that Python (a cluster's module, a container): its PyTorch stays as it is
#
# An active virtual environment or conda environment that has PyTorch is used in the same way as PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# FFCV asks pkg-config for all of OpenCV; where there is none (conda has one), setup/opencv4.pc names the parts it uses.
pc=$PWD/setup:
if pkg-config --exists opencv4 2>/dev/null; then pc=; fi

say() { echo "setup: $*" >&2; }

choose_python() {      # an environment with PyTorch is used as it is; else .venv
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON"
  elif [ -n "$active" ] && "$active/bin/python" -c "import torch" 2>/dev/null; then
    echo "$active/bin/python"
  else
    [ -x .venv/bin/python ] || { say "making .venv"; python3 -m venv .venv >&2; }
    echo "$PWD/.venv/bin/python"
  fi
}

have_headers() {
  "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_paths()["include"] + "/Python.h")' 2>/dev/null \
    && command -v g++ >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists libturbojpeg \
    && PKG_CONFIG_PATH=$pc${PKG_CONFIG_PATH:-} \
       sh -c 'printf "#include <opencv2/opencv.hpp>\n" | g++ -E $(pkg-config --cflags opencv4) -x c++ - >/dev/null 2>&1'
}

system_packages="libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev pkg-config g++ python3-dev python3-venv"
install_headers() {      # what FFCV is compiled against
  have_headers && return
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    say "installing $system_packages"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $system_packages >/dev/null
  fi
  have_headers && return
  say "FFCV needs headers of OpenCV (core, imgproc), TurboJPEG and Python, pkg-config and a C++ compiler:"
  say "  sudo apt-get install $system_packages"
  say "or, without root:  conda install -c conda-forge opencv libjpeg-turbo pkg-config cxx-compiler"
  say "then run this again."
  exit 1
}

install_packages() {
  local skip='^$'
  if "$python" -c "import torch, torchvision" 2>/dev/null; then skip='^torch'; fi      # keep the PyTorch that is there
  if "$python" -c "import faiss; faiss.StandardGpuResources" 2>/dev/null; then skip+='|^faiss'; fi      # and FAISS with GPUs
  say "installing the Python packages (PyTorch is large; this takes minutes)"
  PKG_CONFIG_PATH=$pc${PKG_CONFIG_PATH:-} "$python" -m pip install -q --disable-pip-version-check \
    --root-user-action=ignore -r <(grep -vE "$skip" requirements.txt) >&2
}

python=$(choose_python)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { say "$python: Python 3.10 or later is needed"; exit 1; }
stamp=$(cat requirements.txt setup.sh pyproject.toml | cksum | cut -d' ' -f1)
done_file=$("$python" -c 'import sys; print(sys.prefix)')/.mrl-setup-$stamp
if [ ! -e "$done_file" ] || ! "$python" -c "import ffcv, MRL, mrl_models, mrl_images" 2>/dev/null; then
  "$python" -c "import ffcv" 2>/dev/null || install_headers
  install_packages
  "$python" -c "import torch, torchvision, ffcv, faiss, MRL, mrl_images" || { say "the environment does not work"; exit 1; }
  touch "$done_file"
fi
export PATH="$(dirname "$python"):$PATH"      # for scripts that source this one
