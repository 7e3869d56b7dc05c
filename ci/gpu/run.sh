#!/usr/bin/env bash
# Runs what a machine with NVIDIA GPUs should run, and writes two reports. See doc/gpu.md.
#
#   ci/gpu/run.sh [STEP...]             from this checkout, with a package index
#   ci/gpu/run.sh --kit KIT [STEP...]   with a kit of ./build.sh gpu-kit, without a network
#
# With a kit, PYTHON names a Python that has torch and pytest. Reports go to $OUT, else to gpu-report/.
set -euo pipefail

export OUT=${OUT:-$PWD/gpu-report}
if [[ ${1:-} != --kit ]]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/../.."
  exec ./build.sh gpu "$@"
fi

[[ $# -ge 2 ]] || { echo "ci/gpu/run.sh: --kit needs the kit, or the folder that it is in" >&2; exit 2; }
kit=$(realpath "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
folder=$("$python" -m ci.gpu.kit "$kit")
export PYTHONPATH=$folder/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
cd "$folder/checkout"
exec "$python" -m ci.gpu --stock-python "$folder/stock-python" "$@"
