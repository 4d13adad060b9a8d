#!/usr/bin/env bash
# Peak memory and time of `mlx-quant eval` on text that is larger than memory needs to be, beside reading the file.
#
#   scripts/large_text.sh WORK_DIR [--gigabytes 3] [--windows 128] [--sequence-length 512] [--keep] [--bin FILE] [--out FILE]
#
# Writes a .jsonl of that size (numbered paragraphs of the calibration text), then runs on the built-in demo model
#   cat         the file to /dev/null
#   windows     eval --dry-run: windows are picked, nothing is computed
#   eval        the windows are evaluated
# and prints one JSON object (also appended to --out). Peak memory is what the system reports of the process (wait4). The
# file is removed afterwards.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/target/release/mlx-quant
out=$root/benches/results/large-text.jsonl
gigabytes=3 windows=128 length=512 keep=0 parent=''

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while (($#)); do
  case $1 in
    --gigabytes) gigabytes=${2?}; shift 2 ;;
    --windows) windows=${2?}; shift 2 ;;
    --sequence-length) length=${2?}; shift 2 ;;
    --bin) bin=${2?}; shift 2 ;;
    --out) out=${2?}; shift 2 ;;
    --keep) keep=1; shift ;;
    -*) usage ;;
    *) [[ -z $parent ]] || usage; parent=$1; shift ;;
  esac
done
[[ -n $parent ]] || usage
[[ -x $bin ]] || { echo "no binary at $bin: cargo build --release, or give --bin" >&2; exit 1; }

mkdir -p "$parent"
text=$parent/large-$gigabytes-gb.jsonl
trap '((keep)) || rm -f "$text"' EXIT
python3 - "$root" "$text" "$gigabytes" "$bin" "$windows" "$length" "$out" <<'EOF'
import json, os, subprocess, sys, time
from datetime import datetime, timezone
from pathlib import Path

root, text, gigabytes, binary, windows, length, out = Path(sys.argv[1]), *sys.argv[2:]
sys.path.insert(0, str(root / "scripts"))
from _measure import machine

size = int(float(gigabytes) * 1e9)
if not os.path.exists(text) or os.path.getsize(text) < size:
    paragraphs = [part for part in (root / "crates/texts/files/calibration.txt").read_text().split("\n\n") if len(part) > 200]
    rows = [json.dumps({"id": "%012d", "source": "large_text.sh", "text": part}).replace("%", "%%").replace("%%012d", "%012d") for part in paragraphs]
    number = written = 0
    with open(text, "w", buffering=1 << 22) as file:
        while written < size:
            line = rows[number % len(rows)] % number + "\n"
            file.write(line)
            written += len(line)
            number += 1


def run(label, *command):
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE if label != "cat" else subprocess.DEVNULL)
    output = process.stdout.read() if process.stdout else b""
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{label}: exit status {status}")
    made = {"seconds": round(time.monotonic() - start, 2), "cpu_seconds": round(used.ru_utime + used.ru_stime, 2), "peak_bytes": used.ru_maxrss * 1024}
    return made, output


common = [binary, "eval", "--data", text, "--windows", windows, "--sequence-length", length, "--json"]
run("cat", "cat", text)  # into the page cache, as far as it fits
cat, _ = run("cat", "cat", text)
picked, plan = run("windows", *common, "--dry-run")
evaluated, result = run("eval", *common)
source = json.loads(plan)["data"]["sources"][0]
record = {
    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(), "binary": os.path.relpath(binary, root),
    "file_bytes": os.path.getsize(text), "windows": json.loads(plan)["data"]["windows"], "sequence_length": int(length),
    "bytes_read": source["bytes_read"], "extent": source["extent"], "documents": source["documents"], "tokens": source["tokens"],
    "cat": cat, "dry_run": picked, "eval": evaluated, "perplexity": json.loads(result)["perplexity"],
}
with open(out, "a") as file:
    file.write(json.dumps(record) + "\n")
print(json.dumps(record, indent=1))
EOF
