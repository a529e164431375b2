#!/usr/bin/env bash
# Sets up if needed, then runs ruff and the tests, in two processes with one thread each. Arguments go to pytest:
#
#   ./test.sh tests/test_mrl.py -k loss
cd "$(dirname "$0")"
source ./setup.sh
ruff check .
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile "$@"
