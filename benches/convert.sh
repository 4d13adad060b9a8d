#!/usr/bin/env bash
# Times `mlx-quant convert -q` and the real `mlx_lm.convert -q` in turn on one checkpoint, with cp as a floor.
#
#   benches/convert.sh MODEL_DIR [-n PAIRS] [--bin FILE] [--work DIR] [--results DIR] [-- FLAGS...]
#
# One warm-up of each, then PAIRS (5) of each, outputs deleted after every run. FLAGS are given to both
# (default: -q). --work is where the outputs go (default: a temporary folder). Prints wall time and peak
# memory of every pair and the medians, and appends the raw runs to benches/results/.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/target/release/mlx-quant
results=$root/benches/results
pairs=5
model='' work=''
flags=(-q)

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while (($#)); do
  case $1 in
    -n) pairs=${2?}; shift 2 ;;
    --bin) bin=${2?}; shift 2 ;;
    --work) work=${2?}; shift 2 ;;
    --results) results=${2?}; shift 2 ;;
    --) shift; flags=("$@"); break ;;
    -*) usage ;;
    *) [[ -z $model ]] || usage; model=$1; shift ;;
  esac
done
[[ -d $model ]] || usage
[[ -x $bin ]] || { echo "no binary at $bin: cargo build --release, or give --bin" >&2; exit 1; }

export MLX_OPENBLAS=0
"$root/scripts/mlx.sh" -c 'import mlx_lm.convert'
work=$(mktemp -d "${work:-${TMPDIR:-/tmp}}/mlx-quant-bench.XXXXXX")
trap 'rm -rf "$work"' EXIT

run() {
  python3 "$root/scripts/_measure.py" run "$work/log" "$1" "pair=$2" "warm_up=$((${2} == 0))" -- "${@:3}"
  rm -rf "$work/out"
}
for ((i = 0; i <= pairs; i++)); do
  run mlx-quant "$i" "$bin" convert --model "$model" --mlx-path "$work/out" ${flags[@]+"${flags[@]}"} --quiet
  run mlx-lm "$i" "$root/scripts/mlx.sh" "$root/scripts/mlx_lm_convert.py" --model "$model" --mlx-path "$work/out" ${flags[@]+"${flags[@]}"}
  run cp "$i" cp -R "$model" "$work/out"
done
python3 "$root/scripts/_measure.py" save convert "$work/log" "$results" "$bin"
