#!/usr/bin/env python3
"""Decodes the packed fixtures with the published packages that write such files, and compares bit for bit.

    python3 scripts/packed_references.py [--work DIR] [--site-packages DIR] [--archives DIR] [PACKAGE ...]

`crates/quant/tests/fixtures/packed/make.py` holds what each packing means as numpy, written down from other programs'
code. Here those programs' own functions decode the same files: compressed-tensors (0.20.1, and 0.12.2 for what newer
versions dropped), AutoAWQ, AutoGPTQ, GPTQModel, NVIDIA ModelOpt, transformers. Every matrix must have the SHA-256 that
the form's decoded.json has.

What is needed is installed: the first call makes a virtual environment in --work (default: a folder in $TMPDIR or /tmp)
with `SHARED` and `BESIDE`, pinned, from pip's index (torch: some gigabytes), and unpacks the archives of `PACKAGES`
beside it, each alone in a folder, so that two versions of one can be asked. Python 3.11 is needed (AutoGPTQ's last
wheel). --site-packages takes torch, transformers and their like from a folder instead; --archives takes wheels and
sdists from one.

Each line is a form and the function that decoded it. `float32`: asked in float32, its result has the hash. `rounded`:
as the package itself decodes, in a 16-bit dtype, its result is that float32 rounded once. Two things differ between
packages without one being wrong, and are said in the line: ModelOpt's table of nvfp4 holds 0 for the code of -0, and
transformers keeps fp8 blocks in float32 where mlx-lm rounds them to bfloat16. AutoAWQ's and AutoGPTQ's __init__ is passed
by (it imports model classes that transformers no longer has); the modules asked are theirs, unchanged.

Exit status 1: a value differs, or a form that a package decodes could not be asked.
"""

import argparse
import collections
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent.parent / "crates/quant/tests/fixtures/packed"
SHARED = ["torch==2.15.0", "transformers==5.24.0", "safetensors==0.8.0", "numpy==2.4.6", "datasets==5.2.0", "loguru",
          "pillow", "protobuf", "requests"]
# What packages import beside: with their own needs left out, so that torch stays what it is.
BESIDE = ["accelerate==1.15.0", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3", "logbar==0.4.15", "pypcre==0.6.4",
          "device-smi==0.5.7", "tokenicer==0.0.14", "defuser==0.0.28", "threadpoolctl==3.8.0", "torchao==0.18.0",
          "ninja==1.13.2", "nvidia-ml-py==13.615.71", "pulp==3.3.2"]
PACKAGES = ["compressed-tensors==0.20.1", "compressed-tensors==0.12.2", "autoawq==0.2.9", "auto-gptq==0.7.1",
            "gptqmodel==7.7.0", "nvidia-modelopt==0.47.0", "transformers==5.24.0"]
UNDECODED = {
    "fp8_fbgemm": "transformers hands it to fbgemm's product on a card (FbgemmFp8Linear); no package decodes it",
}


def modules_of(form):
    """Path of each packed module, its tensors by leaf, and the hash of the decoded weight."""
    from safetensors.torch import load_file

    tensors = load_file(form / "model.safetensors")
    for name, expected in json.loads((form / "decoded.json").read_text()).items():
        path = name.removesuffix("weight")
        yield name, {key[len(path):]: value for key, value in tensors.items() if key.startswith(path)}, expected


def config_of(form):
    return json.loads((form / "config.json").read_text()).get("quantization_config", {})


def bare(*names):
    """Packages whose __init__ is not run; modules in them are imported as usual."""
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = [str(Path(folder, *name.split("."))) for folder in sys.path]
        sys.modules[name] = module


# Each gives, for a form that its package decodes, a list of (function, kind, matrix of `out` rows).


def compressed_tensors(form, parts, config):
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    if config.get("quant_method") != "compressed-tensors" or form in ("int3_spare", "int4_order"):
        return []
    weights = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    kind, rows = config["format"], 64
    compressor = BaseCompressor.get_value_from_registry(kind)
    named = f"{compressor.__name__}.decompress"
    if kind == "pack-quantized":
        parts.setdefault("weight_shape", torch.tensor([rows, parts["weight_scale"].shape[0]]))
    published = ("rounded", compressor.decompress(parts, scheme)["weight"])
    if kind in ("pack-quantized", "int-quantized", "float-quantized"):
        wide = dict(parts, weight_scale=parts["weight_scale"].float())
        exact = [(named, "float32", compressor.decompress(wide, scheme)["weight"])]
    elif kind == "mxfp8-quantized":
        scale = decompress_mx_scale(parts["weight_scale"]).float()
        exact = [("dequantize", "float32", dequantize(parts["weight"], scale, args=weights))]
    else:
        packed, scale, whole = (parts.get(f"weight_{leaf}") for leaf in ("packed", "scale", "global_scale"))
        values = unpack_fp4_from_uint8(packed, rows, packed.shape[1] * 2, torch.float32)
        scale = decompress_mx_scale(scale).float() if kind.startswith("mxfp4") else scale.float()
        value = dequantize(values, scale, args=weights, dtype=torch.float32, global_scale=whole)
        exact = [("unpack_fp4_from_uint8, dequantize", "float32", value)]
    return exact + ([(named, *published)] if published[1].element_size() == 2 else [])


def old_compressed_tensors(form, parts, config):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs

    if form not in ("int3_spare", "int4_order", "int4_experts", "int8_rows"):
        return []
    weights = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    own = PackedQuantizationCompressor()
    decode = lambda scale: own.decompress_weight(dict(parts, weight_scale=scale), weights)  # noqa: E731
    scale, named = parts["weight_scale"], "PackedQuantizationCompressor.decompress_weight"
    made = [(named, "float32", decode(scale.float()))]
    return made + ([(named, "rounded", decode(scale))] if scale.element_size() == 2 else [])


def awq_by(dequantize, named, parts, config):
    scale, group = parts["scales"], config["group_size"]
    decode = lambda scale: dequantize(parts["qweight"], parts["qzeros"], scale, 4, group).T  # noqa: E731
    return [(named, "float32", decode(scale.float())), (named, "rounded", decode(scale))]


def autoawq(form, parts, config):
    bare("awq", "awq.utils")
    from awq.utils.packing_utils import dequantize_gemm

    return awq_by(dequantize_gemm, "dequantize_gemm", parts, config) if form == "awq" else []


def auto_gptq(form, parts, config):
    """Version 1 alone. Its layer decodes within its product: with the unit matrix, the product is the weight."""
    bare("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear")
    import torch
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    if config.get("quant_method") != "gptq" or config["checkpoint_format"] != "gptq":
        return []
    layer = QuantLinear(config["bits"], config["group_size"], 64, 64, False, weight_dtype=torch.float32)
    layer.load_state_dict(dict(parts, scales=parts["scales"].float()))
    return [("QuantLinear(unit matrix)", "float32", layer(torch.eye(64)).T)]


def gptqmodel(form, parts, config):
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    if form == "awq":
        return awq_by(dequantize_gemm, "awq dequantize_gemm", parts, config)
    if config.get("quant_method") != "gptq":
        return []
    first = config["checkpoint_format"] == "gptq"
    made = []
    for kind in ("float32", "rounded"):
        layer = TorchLinear(bits=config["bits"], group_size=config["group_size"], sym=config["sym"], desc_act=config["desc_act"],
                            in_features=64, out_features=64, format=FORMAT(config["checkpoint_format"]))
        layer.load_state_dict(parts)
        if first:
            convert_gptq_v1_to_v2_format_module(layer, config["bits"], torch.int32)
        if kind == "float32":
            layer.scales = layer.scales.float()
        steps = "convert_gptq_v1_to_v2_format_module, " if first else ""
        made.append((f"{steps}TorchLinear.dequantize_weight", kind, layer.eval().dequantize_weight().T))
    return made


def modelopt(form, parts, config):
    import torch
    import modelopt.torch.quantization  # noqa: F401 (its modules import each other in this order alone)
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    def decode(kind, data, dtype=torch.float32, **how):
        return kind(torch.Size((64, 64)), dtype, data).dequantize(dtype, **how)

    if form in ("nvfp4_modelopt", "nvfp4_modelopt_one"):
        how = dict(scale=parts["weight_scale"], double_scale=parts["weight_scale_2"], block_sizes={-1: 16})
        codes = torch.stack([parts["weight"] & 15, parts["weight"] >> 4], -1).reshape(64, 64)
        made = []
        for kind, dtype in (("float32", torch.float32), ("rounded", torch.bfloat16)):
            value = decode(NVFP4QTensor, parts["weight"], dtype, **how)
            assert (value[codes == 8] == 0).all()
            value[codes == 8] = -0.0
            made.append(("NVFP4QTensor.dequantize (its 0 of code 8 as -0)", kind, value))
        return made
    if form == "fp8_modelopt":
        return [("FP8QTensor.dequantize", "float32", decode(FP8QTensor, parts["weight"], scale=parts["weight_scale"]))]
    if form in ("mxfp8", "mxfp8_compressed"):
        scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
        return [("MXFP8QTensor.dequantize", "float32", decode(MXFP8QTensor, parts["weight"], scale=scale))]
    if form == "mxfp4_compressed":
        how = dict(scale=parts["weight_scale"], block_sizes={-1: 32})
        return [("MXFP4QTensor.dequantize", "float32", decode(MXFP4QTensor, parts["weight_packed"], **how))]
    return []


def transformers(form, parts, config):
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    if form == "mxfp4_compressed":
        blocks = parts["weight_packed"].reshape(1, 64, 2, 16)
        value = convert_moe_packed_tensors(blocks, parts["weight_scale"][None], dtype=torch.float32)
        return [("convert_moe_packed_tensors", "float32", value[0].T)]
    if form not in ("fp8_blocks", "fp8_ue8m0", "mxfp8"):
        return []
    own = Fp8Dequantize(None)
    value = own._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)
    published = own.convert(parts)["weight"]
    named = "Fp8Dequantize"
    if form == "fp8_blocks":
        return [(f"{named} (float32), to bfloat16 as mlx-lm", "float32", value.bfloat16())]
    return [(named, "float32", value), (named, "rounded", published)]


DECODERS = dict(zip(PACKAGES, [compressed_tensors, old_compressed_tensors, autoawq, auto_gptq, gptqmodel, modelopt, transformers]))


def compare(kind, value, expected, exact):
    """Whether it is the same, bit for bit; what it was compared as; the matrix in float32."""
    import torch

    if kind == "rounded":
        value = value.contiguous()
        once = exact.to(value.dtype)
        return torch.equal(value.view(torch.int16), once.view(torch.int16)), str(value.dtype).removeprefix("torch."), exact
    wide = value.float().contiguous()
    return hashlib.sha256(wide.numpy().tobytes()).hexdigest() == expected, "float32", wide


def ask(package):
    """In a process of its own: prints a line of JSON for each form and function."""
    for form in sorted(path for path in FIXTURES.iterdir() if path.is_dir()):
        results = collections.OrderedDict()
        for name, parts, expected in modules_of(form):
            exact = None
            for function, kind, value in DECODERS[package](form.name, parts, config_of(form)):
                same, words, exact = compare(kind, value.detach(), expected, exact)
                count = results.setdefault((function, words), [0, 0])
                count[0] += same
                count[1] += 1
        for (function, words), (same, all_) in results.items():
            print(json.dumps([form.name, function, words, same, all_]), flush=True)


def install(work, site_packages, archives):
    """A virtual environment, and a folder for each package; its python."""
    venv = work / "venv"
    python = venv / "bin/python"
    pip = [python, "-m", "pip", "-q", "--disable-pip-version-check"]
    if not (work / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        if site_packages:
            own = next(venv.glob("lib/python*/site-packages"))
            (own / "shared.pth").write_text(f"{site_packages}\n")
        else:
            subprocess.run([*pip, "install", *SHARED], check=True)
        subprocess.run([*pip, "install", "--no-deps", *BESIDE], check=True)
        (work / ".ready").touch()
    for package in PACKAGES[:-1]:
        folder = work / package
        if folder.exists():
            continue
        name, version = package.replace("-", "_").split("==")
        find = lambda: next(path for path in archives.iterdir() if path.name.startswith(f"{name}-{version}"))  # noqa: E731
        try:
            archive = find()
        except StopIteration:
            subprocess.run([*pip, "download", "--no-deps", "-d", archives, package], check=True)
            archive = find()
        partial = work / f".{package}"
        if archive.suffix == ".whl":
            zipfile.ZipFile(archive).extractall(partial)
            partial.rename(folder)
        else:
            tarfile.open(archive).extractall(partial, filter="data")
            next(partial.iterdir()).rename(folder)
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mlx-quant-packed-references")
    parser.add_argument("--site-packages", type=Path)
    parser.add_argument("--archives", type=Path)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("packages", nargs="*", default=PACKAGES)
    args = parser.parse_args()
    if args.ask:
        ask(args.ask)
        return
    archives = args.archives or args.work / "archives"
    for folder in (args.work, archives):
        folder.mkdir(parents=True, exist_ok=True)
    python = install(args.work.resolve(), args.site_packages, archives)
    asked, wrong, matrices, failed = set(), 0, 0, 0
    for package in args.packages:
        own = dict(os.environ, PYTHONPATH=str(args.work.resolve() / package), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
        run = subprocess.run([python, __file__, "--ask", package], env=own, capture_output=True, text=True)
        for line in run.stdout.splitlines():
            if not line.startswith('["'):
                continue
            form, function, kind, same, count = json.loads(line)
            asked.add(form)
            matrices += count
            wrong += count - same
            verdict = "same" if same == count else f"OTHER: {count - same}"
            print(f"{form:20} {package:27} {kind:8} {verdict} of {count:2}  {function}", flush=True)
        if run.returncode:
            failed += 1
            print(f"FAILED {package}: {run.stderr.strip().splitlines()[-1]}", flush=True)
    forms = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
    for form in (form for form in forms if form not in asked):
        print(f"{form:20} not decoded: {UNDECODED.get(form, 'not asked')}")
    unexplained = [form for form in forms if form not in asked and form not in UNDECODED]
    print(f"{len(asked)} of {len(forms)} forms decoded by {len(args.packages)} packages: {matrices - wrong} of {matrices} matrices the same")
    sys.exit(bool(wrong or failed or (unexplained and args.packages == PACKAGES)))


if __name__ == "__main__":
    main()
