#!/usr/bin/env bash
# Run the GPU steps and write two reports. See doc/gpu.md.
#
#   ci/gpu/run.sh [STEP...]             from this checkout, with a package index
#   ci/gpu/run.sh --kit KIT [STEP...]   with a kit of ./build.sh gpu-kit, without a network
#
# With a kit, PYTHON selects a Python with torch and pytest. Reports are in $OUT, by default gpu-report/.
set -euo pipefail

export OUT=${OUT:-$PWD/gpu-report}
if [[ ${1:-} != --kit ]]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/../.."
  exec ./build.sh gpu "$@"
fi

[[ $# -ge 2 ]] || { echo "ci/gpu/run.sh: --kit needs the kit or its folder" >&2; exit 2; }
kit=$(realpath "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
folder=$("$python" -m ci.gpu.kit "$kit")
export PYTHONPATH=$folder/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
cd "$folder/checkout"
exec "$python" -m ci.gpu --stock-python "$folder/stock-python" "$@"
