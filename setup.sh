#!/usr/bin/env bash
# Creates the environment for demo.sh and test.sh if it does not exist yet. Safe to run again.
#
#   ./setup.sh                        a virtual environment .venv, with the pinned packages
#   PYTHON=/path/to/python ./setup.sh    that Python (a cluster's module, a container): its PyTorch stays as it is
#   FFCV=0 ./setup.sh                 without FFCV, which is compiled here; training then reads image folders only
#
# An active virtual environment or conda environment that has PyTorch is used in the same way as PYTHON.
# uv fills .venv; where uv cannot be had, and in an environment of yours (which may borrow packages), pip installs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
unset PYTHONDONTWRITEBYTECODE      # containers set it: every start of Python would compile PyTorch's modules again, 7 s

# FFCV asks pkg-config for all of OpenCV; where there is none (conda has one), setup/opencv4.pc names the parts it uses.
pc=$PWD/setup:
if pkg-config --exists opencv4 2>/dev/null; then pc=; fi

say() { echo "setup: $*" >&2; }

choose_python() {      # an environment with PyTorch is used as it is; else .venv
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON"
  elif [ -n "$active" ] && "$active/bin/python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('torch'))"; then
    echo "$active/bin/python"
  else
    "$PWD/.venv/bin/python" -c "" 2>/dev/null || { say "making .venv"; python3 -m venv --clear .venv >&2; }
    echo "$PWD/.venv/bin/python"
  fi
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }

ours() { [ "$python" = "$PWD/.venv/bin/python" ]; }

# ---- packages

choose_installer() {
  uv=
  ours || return 0
  if has uv || "$python" -m pip install -q uv 2>/dev/null; then uv=.venv/bin/uv
  else say "uv cannot be had; pip takes longer"; fi
}

install() {      # the lines of requirements.txt that it is given
  if [ -n "$uv" ]; then
    install_with_uv "$1" && return
    say "uv could not; pip tries"
  fi
  "$python" -m pip install -q --disable-pip-version-check --root-user-action=ignore -r <(echo "$1") >&2
}

install_with_uv() {      # shows of its words all but the list of packages
  (eval "$("$python" setup/uv_settings.py)"
   "$uv" pip install --python "$python" -r <(echo "$1") 2>&1 | sed -u '/^ [-+~] /d' >&2)
}

install_packages() {
  local skip='^ffcv'
  ours || ! has torch torchvision || skip+='|^torch'      # keep the PyTorch that is there, and FAISS with GPUs
  if "$python" -c "import faiss; faiss.StandardGpuResources" 2>/dev/null; then skip+='|^faiss'; fi
  say "installing the Python packages (new ones are 2.5 GB to download, most of it CUDA for PyTorch)"
  install "$(grep -vE "$skip" requirements.txt)"
}

# ---- FFCV

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
  return 1
}

install_ffcv() {
  install_headers || return 1
  say "compiling FFCV"
  (export PKG_CONFIG_PATH=$pc${PKG_CONFIG_PATH:-}; install "$(grep ^ffcv requirements.txt)")
}

# ---- all of it

set_up() {
  local began=$SECONDS
  choose_installer
  install_packages
  [ "${FFCV:-1}" = 0 ] || "$python" -c "import ffcv" 2>/dev/null || install_ffcv || true
  "$python" -c "import torch, torchvision, faiss, MRL, mrl_images" || { say "the environment does not work"; exit 1; }
  "$python" setup/installed.py >"$done_file"
  say "$(dirname "$done_file") is ready, with $(sed -n 's/^torch /PyTorch /p' "$done_file")," \
    "after $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
}

python=$(choose_python)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { say "$python: Python 3.10 or later is needed"; exit 1; }
stamp=$(cat requirements.txt setup.sh pyproject.toml | cksum | cut -d' ' -f1)
done_file=$("$python" -c 'import sys; print(sys.prefix)')/.mrl-setup-$stamp
now=$("$python" setup/installed.py)
if [ ! -e "$done_file" ] || [ "$now" != "$(cat "$done_file")" ]; then
  set_up
elif [ "$0" = "${BASH_SOURCE[0]}" ] && [ "${FFCV:-1}" != 0 ] && grep -q '^ffcv -' "$done_file"; then
  set_up      # ./setup.sh itself tries again what could not be built
elif [ "$0" = "${BASH_SOURCE[0]}" ]; then
  say "$(dirname "$done_file") is ready: nothing to do"
fi
if [ "$0" = "${BASH_SOURCE[0]}" ] && ours; then say "next: source .venv/bin/activate"; fi
if grep -q '^ffcv -' "$done_file"; then
  say "FFCV is not installed: training reads image folders but no .ffcv files (./setup.sh says what FFCV needs)"
fi
export PATH="$(dirname "$python"):$PATH"      # for scripts that source this one
