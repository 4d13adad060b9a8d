#!/usr/bin/env bash
# Times what a graphics card is for, and writes a JSON line for each step:
#
#   scripts/card_runs.sh BIN OUT [DEVICE]
#
# BIN is the program, OUT a directory for models, logs and results.jsonl, DEVICE what --device takes (gpu). Checkpoints of
# random weights are made in OUT/models as they are needed: 8B (16 GB), eight blocks of 70B (18 GB), six of 30B-A3B (9 GB).
# Steps that have a line in results.jsonl and ended well are not run again; a step that takes too long is ended, and its
# line says so. With SHAPES=small models of a few megabytes stand for them, to try this script.
#
# A line has the step, the command, its exit code, the wall time from files to files, the highest memory of process and
# card, what was predicted, and the lines of its log with the seconds at which they came. MORE=--verbose lets it say more,
# block by block; that takes time of its own, for what each block loses is measured then.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=$(realpath "${1:?usage: scripts/card_runs.sh BIN OUT [DEVICE]}")
mkdir -p "${2:?usage: scripts/card_runs.sh BIN OUT [DEVICE]}"
out=$(realpath "$2")
device=${3:-gpu}
results=$out/results.jsonl
touch "$results"

if [[ ${SHAPES:-} == small ]]; then
  llama=(small) large=(small --blocks 2) experts=(small-experts --blocks 2)
  calibrated=(--n-samples 8 --sequence-length 64) few=(--n-samples 4 --sequence-length 64)
  trained=(--iters 4 --batch-size 2 --sequence-length 64 --valid-samples 2) judged=(--windows 4 --sequence-length 64)
else
  llama=(llama-3.1-8b) large=(llama-70b --blocks 8) experts=(qwen3-30b-a3b --blocks 6)
  calibrated=(--n-samples 128 --sequence-length 512) few=(--n-samples 32 --sequence-length 512)
  trained=(--iters 100 --batch-size 4 --sequence-length 512) judged=(--windows 64 --sequence-length 512)
fi

# model NAME SHAPE...: the checkpoint OUT/models/NAME, made if it is not there.
model() {
  local name=$1
  shift
  [[ -e $out/models/$name ]] && return
  rm -rf "$out/models/.$name"
  mkdir -p "$out/models"
  python3 scripts/make_checkpoint.py "$out/models/.$name" --shape "$@"
  mv "$out/models/.$name" "$out/models/$name"
}

# Whether a step has ended well.
is_done() {
  python3 - "$results" "$1" <<'END'
import json, sys
lines = map(json.loads, open(sys.argv[1]))
sys.exit(not any(line["step"] == sys.argv[2] and line["exit"] == 0 for line in lines))
END
}

# step NAME SECONDS COMMAND...: runs BIN with a limit and adds its line.
step() {
  local name=$1 limit=$2
  shift 2
  if is_done "$name"; then
    echo "$name: done before"
    return
  fi
  echo "$name: at most $limit s"
  python3 - "$results" "$name" "$limit" "$out/$name.log" "$bin" "$@" <<'END'
import json, os, resource, subprocess, sys, time

results, name, limit, log, *command = sys.argv[1:]
start = time.monotonic()
run = subprocess.Popen(
    ["timeout", "--kill-after", "20", limit, *command, "--json", *os.environ.get("MORE", "").split()],
    stdout=open(log + ".json", "wb"), stderr=subprocess.PIPE, text=True, errors="replace",
)
lines = []
with open(log, "w") as file:
    for line in run.stderr:
        lines.append([round(time.monotonic() - start, 3), line.rstrip()])
        file.write("{:10.3f} {}\n".format(*lines[-1]))
        file.flush()
code = run.wait()
seconds = time.monotonic() - start
try:
    told = json.load(open(log + ".json"))
except ValueError:
    told = {}
row = {
    "step": name,
    "command": command[1:],
    "exit": code,
    "timed_out": code in (124, 137),
    "seconds": round(seconds, 3),
    # Of all children so far: this process has one.
    "host_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    "card_peak_bytes": told.get("card_peak_memory_bytes"),
    "host_predicted_bytes": told.get("predicted_memory_bytes"),
    "card_predicted_bytes": told.get("card_predicted_memory_bytes"),
    "operations": told.get("operations"),
    "seconds_told": told.get("made", {}).get("quantize_seconds"),
    "kl": told.get("kl_mean"),
    "adapters": told.get("adapters"),
    "phases": lines,
}
with open(results, "a") as file:
    file.write(json.dumps(row) + "\n")
    file.flush()
    os.fsync(file.fileno())
print(f"{name}: exit {code}, {seconds:.1f} s")
END
}

# made NAME SECONDS COMMAND...: a step that writes OUT/made/NAME; what an earlier try left there goes first.
made() {
  local name=$1
  is_done "$name" || rm -rf "$out/made/$name" "$out/made/.$name.partial"
  mkdir -p "$out/made"
  step "$@" --mlx-path "$out/made/$name"
}

gone() { for name in "$@"; do rm -rf "$out/made/$name" "$out/made/.$name.partial"; done; }

on=(--device "$device")
step devices 120 devices --measure

model llama "${llama[@]}"
m=$out/models/llama
made convert 600 convert -q --model "$m"
gone convert
made gptq 900 gptq --model "$m" --fallback-bits 4 --eval-windows 0 "${calibrated[@]}" "${on[@]}"
if [[ -e $out/made/gptq ]]; then
  step eval 900 eval --model "$out/made/gptq" --reference "$m" "${judged[@]}" "${on[@]}"
fi
made awq+gptq 900 quantize --recipe awq+gptq --model "$m" --fallback-bits 4 --eval-windows 0 "${calibrated[@]}" "${on[@]}"
gone awq+gptq
made dynamic 900 dynamic-quant --model "$m" --target-bpw 4.5 --eval-windows 0 "${few[@]}" "${on[@]}"
gone dynamic
made dwq 1800 dwq --model "$m" --eval-windows 0 "${trained[@]}" "${on[@]}"
gone dwq

model large "${large[@]}"
made large-gptq 900 gptq --model "$out/models/large" --fallback-bits 4 --eval-windows 0 "${calibrated[@]}" "${on[@]}"
gone large-gptq

model experts "${experts[@]}"
made experts-gptq 900 gptq --model "$out/models/experts" --fallback-bits 4 --eval-windows 0 "${calibrated[@]}" "${on[@]}"
gone experts-gptq

python3 - "$results" <<'END'
import json, sys
rows = {row["step"]: row for row in map(json.loads, open(sys.argv[1]))}
print(f"{'step':14}{'seconds':>10}{'host':>10}{'card':>10}{'predicted':>11}  GB, exit code")
for row in rows.values():
    size = lambda key: "-" if row.get(key) is None else f"{row[key] / 1e9:.2f}"
    sizes = [size(key) for key in ("host_peak_bytes", "card_peak_bytes", "card_predicted_bytes")]
    print(f"{row['step']:14}{row['seconds']:10.1f}{sizes[0]:>10}{sizes[1]:>10}{sizes[2]:>11}  {row['exit']}")
END
