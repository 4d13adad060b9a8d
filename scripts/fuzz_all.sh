#!/usr/bin/env bash
# Runs all fuzz targets side by side, one process each, and prints a table of what they did.
#
# scripts/fuzz_all.sh BINARY SEEDS OUT SECONDS [TARGET...]
#   BINARY   of `cargo +nightly fuzz build all`; needs nothing but glibc
#   SEEDS    fuzz/seeds: a directory for each target; ../dictionaries beside it is used if it is there
#   OUT      a new directory: OUT/TARGET/{corpus,findings,log}
#   SECONDS  for each target
# A target goes on after a finding (libfuzzer's fork mode), up to 20 of them.
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
binary=$(realpath "$1") seeds=$(realpath "$2") out=$3 seconds=$4
shift 4
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(header index config plan chat jsonl parquet csv recipe sensitivities statistics tokenizer)
for target in "${targets[@]}"; do
  [ -d "$seeds/$target" ] || { echo "$seeds has no $target; hint: give the directory fuzz/seeds" >&2; exit 2; }
done
mkdir "$out" || { echo "$out is there already; hint: name a new directory" >&2; exit 2; }
out=$(realpath "$out")

# Files of the targets: in memory where there is room, gone at the end.
work=$(mktemp -d -p "$([ -d /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")" fuzz.XXXXXX)
pids=()
stop() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

# Runs one target until its time is up. libfuzzer ends at an input that takes too long or too much memory, and where a child
# cannot be started; then it is started again.
one() {
  local target=$1 end left run=0 status options=()
  [ -f "$seeds/../dictionaries/$target.dict" ] && options+=("-dict=$seeds/../dictionaries/$target.dict")
  end=$(($(date +%s) + seconds))
  cd "$out/$target"
  while left=$((end - $(date +%s))) && [ "$left" -gt 0 ] && [ "$(find findings -type f | wc -l)" -lt 20 ] && [ "$run" -lt 100 ]; do
    run=$((run + 1))
    status=0
    FUZZ_TARGET=$target TMPDIR=$work/$target ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0:detect_stack_use_after_return=0} \
      "$binary" corpus "$seeds/$target" -fork=1 -ignore_crashes=1 -ignore_ooms=1 -ignore_timeouts=1 \
      -print_funcs=0 -rss_limit_mb=2048 -timeout=25 -max_total_time="$left" -artifact_prefix=findings/ "${options[@]}" >>log 2>&1 || status=$?
    echo "run $run of $target ended with $status" >>log
    [ "$status" -eq 0 ] || sleep 1
  done
}

for target in "${targets[@]}"; do
  mkdir -p "$out/$target"/{corpus,findings} "$work/$target"
  one "$target" &
  pids+=($!)
done
begin=$(date +%s)
for pid in "${pids[@]}"; do wait "$pid" || true; done
minutes=$(awk -v s=$(($(date +%s) - begin)) 'BEGIN { printf "%.1f", s / 60 }')

# Fork mode prints the executions of all its children so far, as `#123: cov: ...`; a run begins at 0 again.
executions() {
  awk '/^#[0-9]+:? /{ n = $1; gsub(/[#:]/, "", n); last = n + 0 } /^run [0-9]+ of /{ sum += last; last = 0 } END { printf "%d", sum + last }' "$1"
}
printf '| target | minutes | executions | findings |\n|---|---|---|---|\n'
found=0
for target in "${targets[@]}"; do
  findings=$(find "$out/$target/findings" -type f | sort | tr '\n' ' ')
  [ -z "$findings" ] || found=1
  printf '| %s | %s | %s | %s |\n' "$target" "$minutes" "$(executions "$out/$target/log")" "${findings:-none}"
done
exit "$found"
