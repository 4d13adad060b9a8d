#!/usr/bin/env bash
# Peak memory and time of a calibrated run, beside what --dry-run predicted.
#
#   benches/calibrate_memory.sh MODEL [--windows 4] [--bin FILE] [--out FILE] [-- ARGUMENTS, default: gptq]
#
# Prints one JSON object (also appended to --out): measured and predicted peak, what the prediction is made of, seconds.
# scripts/make_checkpoint.py makes models of any size.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/target/release/mlx-quant
out=$root/benches/results/calibrate-memory.jsonl
windows=4 model=''

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while (($#)); do
  case $1 in
    --windows) windows=${2?}; shift 2 ;;
    --bin) bin=${2?}; shift 2 ;;
    --out) out=${2?}; shift 2 ;;
    --) shift; break ;;
    -*) usage ;;
    *) [[ -z $model ]] || usage; model=$1; shift ;;
  esac
done
[[ -n $model ]] || usage
command=("${@:-gptq}")
work=$(mktemp -d "${TMPDIR:-/tmp}/calibrate.XXXXXX")
trap 'rm -rf "$work"' EXIT
common=(--model "$model" --n-samples "$windows" --eval-windows 0 --mlx-path "$work/out" --json --quiet)
predicted=$("$bin" "${command[@]}" "${common[@]}" --dry-run)
result=$("$bin" "${command[@]}" "${common[@]}")
python3 - "$root/scripts" "$model" "$predicted" "$result" "$out" "${command[*]}" <<'EOF'
import json, sys
from datetime import datetime, timezone
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from _measure import machine
predicted, result = json.loads(sys.argv[3]), json.loads(sys.argv[4])
peak, foreseen = result["peak_memory_bytes"], predicted["memory"]["peak"]
record = {
    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(), "model": Path(sys.argv[2]).name,
    "command": sys.argv[6], "windows": result["calibration"]["windows"], "peak_bytes": peak, "predicted_bytes": foreseen,
    "predicted_over_peak": round(foreseen / peak, 3), "memory": predicted["memory"],
    "seconds": round(result["made"]["quantize_seconds"], 1), "seconds_estimate": round(predicted["seconds_estimate"], 1),
}
with open(sys.argv[5], "a") as file:
    file.write(json.dumps(record) + "\n")
print(json.dumps(record, indent=1))
EOF
