"""Python's huggingface_hub and mlx-quant on one cache and one hub, which runs here.

    scripts/mlx.sh scripts/hub.py --bin target/release/mlx-quant --fixture target/debug/hub-fixture --model DIR

Each reads the cache that the other filled, without fetching anything again; huggingface_hub downloads what mlx-quant
uploaded, and mlx_lm loads it by its id. Nothing leaves this machine: the hub is the one of the tests.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOKEN = "hf_fakeTokenThatNobodyMaySee4711"
ID, UPLOADED = "some-org/Tiny", "my-org/Tiny-4bit"

checks = failures = 0


def check(what, good, detail=""):
    global checks, failures
    checks += 1
    failures += not good
    print(f"{'ok  ' if good else 'FAIL'} {what} {'' if good else detail}", flush=True)


def contents(directory):
    """Files by path, as bytes."""
    files = (path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def state(cache):
    """What is in a cache and when it was written."""
    blobs = (path for path in Path(cache).glob("*/blobs/*") if path.is_file())
    return {path.name: path.stat().st_mtime_ns for path in blobs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--fixture", required=True, help="the hub-fixture binary")
    parser.add_argument("--model", required=True, help="a small Hugging Face checkpoint with a tokenizer")
    args = parser.parse_args()
    binary = str(Path(args.bin).resolve())
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        shutil.copytree(args.model, work / "models" / ID)
        (work / "datasets").mkdir()
        command = [args.fixture, "--models", work / "models", "--datasets", work / "datasets", "--token", TOKEN]
        hub = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            compare(binary, work, json.loads(hub.stdout.readline())["endpoint"])
        finally:
            hub.stdin.close()
            hub.wait(30)
    print(f"{checks} checks, {failures} failures")
    sys.exit(failures > 0)


def compare(binary, work, endpoint):
    ours, theirs, third = work / "ours", work / "theirs", work / "third"
    os.environ.update(HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN, HF_HOME=str(theirs), HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="*")
    os.environ.pop("HF_HUB_OFFLINE", None)
    import huggingface_hub
    from huggingface_hub import scan_cache_dir, snapshot_download

    print(f"huggingface_hub {huggingface_hub.__version__}")

    def quant(*line, home, **more):
        environment = {**os.environ, "HF_HOME": str(home), **more}
        done = subprocess.run([binary, *line], cwd=work, env=environment, capture_output=True, text=True)
        check(f"mlx-quant {' '.join(line)}", done.returncode == 0, done.stderr)
        check("the token is not shown", TOKEN not in done.stdout + done.stderr)

    convert = ["convert", "-q", "--bits", "4", "--model", ID, "--mlx-path"]
    source = contents(work / "models" / ID)

    # Filled by us, read by Python: offline, and online without a second download.
    quant(*convert, "by-us", home=ours)
    cache = ours / "hub"
    before = state(cache)
    found = snapshot_download(ID, cache_dir=cache, local_files_only=True)
    read = contents(found)
    check("huggingface_hub reads our cache offline", read and all(source[name] == read[name] for name in read))
    check("with weights, config and tokenizer", {"config.json", "tokenizer.json"} <= set(read))
    snapshot_download(ID, cache_dir=cache, allow_patterns=["*.safetensors", "*.json"])
    kept = {name: time for name, time in state(cache).items() if name in before}
    check("and online, fetching nothing again", kept == before)
    report = scan_cache_dir(cache)
    check("its scan finds no fault", not report.warnings, str(report.warnings))
    check("and one repository", [repo.repo_id for repo in report.repos] == [ID])

    # Filled by Python, read by us.
    for mode in ["1", "0"]:
        shutil.rmtree(theirs, ignore_errors=True)
        environment = {**os.environ, "HF_HUB_DISABLE_XET": mode}
        fill = f"from huggingface_hub import snapshot_download; snapshot_download({ID!r})"
        subprocess.run([sys.executable, "-c", fill], env=environment, check=True)
        before = state(theirs / "hub")
        check("huggingface_hub filled a cache", len(before) > 3)
        quant(*convert, f"offline-{mode}", home=theirs, HF_HUB_OFFLINE="1")
        quant(*convert, f"online-{mode}", home=theirs)
        check("we fetch nothing again", state(theirs / "hub") == before)
        for made in ["offline", "online"]:
            same = contents(work / "by-us") == contents(work / f"{made}-{mode}")
            check(f"the {made} conversion is equal", same)

    # Uploaded by us, downloaded by Python, loaded by mlx_lm.
    quant("upload", "by-us", "--upload-repo", UPLOADED, home=ours)
    for mode in [{}, {"local_dir": third / "plain"}]:
        there = contents(snapshot_download(UPLOADED, cache_dir=third / "cache", **mode))
        there = {name: data for name, data in there.items() if not name.startswith(".")}
        check(f"huggingface_hub downloads what we uploaded {mode and 'into a directory'}", there == contents(work / "by-us"))
    commits = [commit.title for commit in huggingface_hub.list_repo_commits(UPLOADED)]
    check("in one commit", sum("mlx-quant" in title for title in commits) == 1, str(commits))
    import mlx_lm

    model, tokenizer = mlx_lm.load(UPLOADED)
    text = mlx_lm.generate(model, tokenizer, prompt="a", max_tokens=4)
    check("mlx_lm loads it by its id", isinstance(text, str))

    leaks = [path for path in work.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    check("the token is in no file", not leaks, str(leaks))


if __name__ == "__main__":
    main()
