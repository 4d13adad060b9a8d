#!/usr/bin/env bash
# Peak memory of a step of dwq, and of dynamic's measurement, on a checkpoint of random weights, beside what --dry-run predicted.
#
#   benches/trained_memory.sh WORK_DIR --tokenizer DIR [--gigabytes 2] [--layers 16] [--keep] [--bin FILE] [--out FILE]
#
# Appends one JSON object a run to --out. dwq: one step of one window of 128 tokens from round-to-nearest; dynamic: two windows of 128 tokens.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/target/release/mlx-quant
out=$root/benches/results/trained-memory.jsonl
gigabytes=2 layers=16 keep=0 parent='' tokenizer=''

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while (($#)); do
  case $1 in
    --tokenizer) tokenizer=${2?}; shift 2 ;;
    --gigabytes) gigabytes=${2?}; shift 2 ;;
    --layers) layers=${2?}; shift 2 ;;
    --bin) bin=${2?}; shift 2 ;;
    --out) out=${2?}; shift 2 ;;
    --keep) keep=1; shift ;;
    -*) usage ;;
    *) [[ -z $parent ]] || usage; parent=$1; shift ;;
  esac
done
[[ -n $parent && -n $tokenizer ]] || usage
mkdir -p "$parent"
work=$(mktemp -d "$parent/trained-memory-XXXX")
((keep)) || trap 'rm -rf "$work"' EXIT
model=$work/model
python3 "$root/scripts/make_checkpoint.py" "$model" --gigabytes "$gigabytes" --layers "$layers" --vocab 32000 --tokenizer "$tokenizer" >&2

one() { # NAME ARGUMENTS...
  local name=$1; shift
  "$bin" "$@" --model "$model" --mlx-path "$work/$name" --eval-windows 0 --sequence-length 128 --dry-run --json --quiet >"$work/plan.json"
  local start; start=$(date +%s.%N)
  "$bin" "$@" --model "$model" --mlx-path "$work/$name" --eval-windows 0 --sequence-length 128 --json --quiet >"$work/made.json"
  python3 - "$work" "$name" "$gigabytes" "$layers" "$start" <<'PY' | tee -a "$out"
import json, sys, time
work, name, gigabytes, layers, start = sys.argv[1:]
plan, made = (json.load(open(f"{work}/{file}.json")) for file in ("plan", "made"))
peak, predicted = made["peak_memory_bytes"], plan["peak_memory"]
print(json.dumps({"run": name, "gigabytes": float(gigabytes), "layers": int(layers), "peak_bytes": peak, "predicted_bytes": predicted, "predicted_of_peak": round(predicted / peak, 3), "wall_s": round(time.time() - float(start), 1), "dwq": plan["dwq_memory"], "sensitivities": plan["sensitivities_memory"]}))
PY
}

one dwq quantize --recipe rtn+dwq --fallback-bits 4 --iters 1 --batch-size 1 --n-samples 1 --valid-samples 1
one dynamic quantize --recipe dynamic+search --n-samples 2 --target-bpw 4.5
