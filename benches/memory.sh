#!/usr/bin/env bash
# Peak memory of `mlx-quant convert -q` and of the real `mlx_lm.convert -q` on checkpoints of growing size.
#
#   benches/memory.sh WORK_DIR [--sizes 2,8] [--layers 32] [--no-mlx] [--keep] [--bin FILE] [--results DIR] [-- FLAGS...]
#
# Makes checkpoints of random weights of so many gigabytes in WORK_DIR (1.3 times the largest must be free)
# and deletes each after its runs; --keep keeps them, and one found there is used again. FLAGS are given to
# both (default: -q). The raw runs are appended to benches/results/.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/target/release/mlx-quant
results=$root/benches/results
sizes=2,8 layers=32 mlx=1 keep=0
parent='' model=''
flags=(-q)

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while (($#)); do
  case $1 in
    --sizes) sizes=${2?}; shift 2 ;;
    --layers) layers=${2?}; shift 2 ;;
    --no-mlx) mlx=0; shift ;;
    --keep) keep=1; shift ;;
    --bin) bin=${2?}; shift 2 ;;
    --results) results=${2?}; shift 2 ;;
    --) shift; flags=("$@"); break ;;
    -*) usage ;;
    *) [[ -z $parent ]] || usage; parent=$1; shift ;;
  esac
done
[[ -n $parent ]] || usage
[[ -x $bin ]] || { echo "no binary at $bin: cargo build --release, or give --bin" >&2; exit 1; }

export MLX_OPENBLAS=0
((!mlx)) || "$root/scripts/mlx.sh" -c 'import mlx_lm.convert'
mkdir -p "$parent"
work=$(mktemp -d "$parent/memory.XXXXXX")
trap 'rm -rf "$work"; ((keep)) || [[ -z $model ]] || rm -rf "$model"' EXIT

run() {
  python3 "$root/scripts/_measure.py" run "$work/log" "$1" "gigabytes=$size" "source_bytes=$bytes" "largest_bytes=$largest" -- "${@:2}"
  rm -rf "$work/out"
}
for size in ${sizes//,/ }; do
  model=$parent/random-$size-gb-$layers-layers
  if [[ ! -e $model/made.json ]]; then
    rm -rf "$model"
    python3 "$root/scripts/make_checkpoint.py" "$model" --gigabytes "$size" --layers "$layers" >"$work/made.json"
    mv "$work/made.json" "$model"
  fi
  read -r bytes largest < <(python3 -c 'import json, sys; m = json.load(open(sys.argv[1])); print(m["bytes"], m["largest_tensor_bytes"])' "$model/made.json")
  run mlx-quant "$bin" convert --model "$model" --mlx-path "$work/out" ${flags[@]+"${flags[@]}"} --quiet
  ((!mlx)) || run mlx-lm "$root/scripts/mlx.sh" "$root/scripts/mlx_lm_convert.py" --model "$model" --mlx-path "$work/out" ${flags[@]+"${flags[@]}"}
  ((keep)) || rm -rf "$model"
done
python3 "$root/scripts/_measure.py" save memory "$work/log" "$results" "$bin"
