#!/usr/bin/env bash
# Peak memory of `mlx-quant eval --low-memory` on a checkpoint of random weights, beside what --dry-run predicted.
#
#   benches/eval_memory.sh WORK_DIR --tokenizer DIR [--gigabytes 8] [--layers 32] [--windows 4] [--keep] [--bin FILE] [--out FILE]
#
# Prints one JSON object (also appended to --out): measured and predicted peak, the bound (largest block and
# embedding in float32, and 1 GB), seconds. --tokenizer is a directory with a tokenizer.json of at most 32,000 ids.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/target/release/mlx-quant
out=$root/benches/results/eval-memory.jsonl
gigabytes=8 layers=32 windows=4 keep=0 parent='' tokenizer=''

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while (($#)); do
  case $1 in
    --tokenizer) tokenizer=${2?}; shift 2 ;;
    --gigabytes) gigabytes=${2?}; shift 2 ;;
    --layers) layers=${2?}; shift 2 ;;
    --windows) windows=${2?}; shift 2 ;;
    --bin) bin=${2?}; shift 2 ;;
    --out) out=${2?}; shift 2 ;;
    --keep) keep=1; shift ;;
    -*) usage ;;
    *) [[ -z $parent ]] || usage; parent=$1; shift ;;
  esac
done
[[ -n $parent && -n $tokenizer ]] || usage
[[ -x $bin ]] || { echo "no binary at $bin: cargo build --release, or give --bin" >&2; exit 1; }

mkdir -p "$parent"
model=$parent/random-eval-$gigabytes-gb-$layers-layers
trap '((keep)) || rm -rf "$model"' EXIT
if [[ ! -e $model/made.json ]]; then
  rm -rf "$model"
  python3 "$root/scripts/make_checkpoint.py" "$model" --gigabytes "$gigabytes" --layers "$layers" --tokenizer "$tokenizer" >"$parent/made.json"
  mv "$parent/made.json" "$model"
fi
predicted=$("$bin" eval --model "$model" --low-memory --windows "$windows" --dry-run --json)
result=$("$bin" eval --model "$model" --low-memory --windows "$windows" --json --quiet)
python3 - "$root/scripts" "$model" "$predicted" "$result" "$out" <<'EOF'
import json, math, sys
from datetime import datetime, timezone
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from _measure import Checkpoint, machine
model, predicted, result = Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
blocks, embedding = {}, 0
for name, (_, shape) in Checkpoint(model).tensors.items():
    size = 4 * math.prod(shape)
    if name.startswith("model.layers."):
        block = name.split(".")[2]
        blocks[block] = blocks.get(block, 0) + size
    elif name == "model.embed_tokens.weight":
        embedding = size
peak, foreseen = result["peak_memory_bytes"], predicted["memory"]["peak"]
bound = max(blocks.values()) + embedding + 10**9
record = {
    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(), "model": model.name,
    "windows": result["windows"], "sequence_length": result["sequence_length"], "peak_bytes": peak, "predicted_bytes": foreseen,
    "predicted_over_peak": round(foreseen / peak, 3), "bound_bytes": bound, "within_bound": peak <= bound,
    "largest_block_bytes": max(blocks.values()), "embedding_bytes": embedding, "seconds": round(result["seconds"], 1),
    "memory": predicted["memory"],
}
with open(sys.argv[5], "a") as file:
    file.write(json.dumps(record) + "\n")
print(json.dumps(record, indent=1))
EOF
