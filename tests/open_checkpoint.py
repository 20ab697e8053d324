#!/usr/bin/env python3
"""Opens a checkpoint of ours with the Python package `safetensors`: other programs read what we write.

    open_checkpoint.py TEST_CHECKPOINT      the program that tests/test_checkpoint.cpp becomes

It needs `safetensors` and `numpy`, and ends with 77, which ctest calls skipped, where they are not installed:

    python3 -m venv build/python && build/python/bin/pip install safetensors numpy
    build/python/bin/python tests/open_checkpoint.py build/quick/tests/test_checkpoint
    cmake --preset quick -DHYBRIDATTN_PYTHON=$PWD/build/python/bin/python      # and ctest runs it, too
"""
import json
import os
import subprocess
import sys
import tempfile

try:
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import load_file
except ImportError as missing:
    print(f"skipped: {missing}; pip install safetensors numpy")
    sys.exit(77)


def checksum(array):
    """Of the bits of 32-bit numbers, each times its place, modulo 2^64."""
    bits = np.ascontiguousarray(array).view(np.uint32).reshape(-1).astype(np.uint64)
    return int((bits * np.arange(1, bits.size + 1, dtype=np.uint64)).sum(dtype=np.uint64))


def check(holds, sentence):
    if not holds:
        sys.exit("FAILED: " + sentence)


if len(sys.argv) != 2:
    sys.exit("usage: open_checkpoint.py TEST_CHECKPOINT")
with tempfile.TemporaryDirectory() as folder:
    environment = dict(os.environ, HYBRIDATTN_TEST_FOLDER=folder)
    subprocess.run([sys.argv[1], "[.writes]"], env=environment, check=True, stdout=subprocess.DEVNULL)
    path = os.path.join(folder, "run.safetensors")
    with open(os.path.join(folder, "expected.json")) as file:
        expected = json.load(file)
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()["hybridattn"])

names = set(expected["tensors"]) | {"history.loss"}
check(set(tensors) == names, f"names: {sorted(set(tensors) ^ names)} are in one of the two only")
for name, tensor in expected["tensors"].items():
    found = tensors[name]
    check(found.dtype == np.float32, f"{name} is {found.dtype}")
    check(list(found.shape) == tensor["shape"], f"{name} has shape {found.shape}, not {tensor['shape']}")
    check(float(found.flat[0]) == tensor["first"], f"{name} starts with {found.flat[0]}, not {tensor['first']}")
    check(checksum(found) == tensor["sum"], f"{name} has other values")
losses = tensors["history.loss"]
check(losses.dtype == np.float64 and losses.tolist() == expected["history.loss"], f"losses are {losses}")
check(description["format_version"] == 1, f"the format is version {description['format_version']}")
check(description["pattern"] == ["GDN", "Full", "DSA"], f"the pattern is {description['pattern']}")
check(description["step"] == 4 and description["optimizer"]["steps"] == 4, f"the step is {description['step']}")
check(list(tensors["embedding"].shape) == [description["model"]["vocab_size"], description["model"]["model_dim"]], "sizes")
print(f"{len(tensors)} tensors, {sum(t.size for t in tensors.values())} numbers, as they were written")
