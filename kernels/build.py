"""Compiles the kernels for every architecture into strait.fatbin, which the binary embeds, and writes registers.txt: what each kernel
takes on each, and the hash of the sources both were made of. Needs no GPU: CUDA 13.0's compiler comes from PyPI.

    python3 kernels/build.py            makes both anew
    python3 kernels/build.py --check    makes them elsewhere, and fails where they are not what is committed

Either way it fails where a hot kernel spills, touches registers of products under way, or asks for other things than its sources do before it waits
for the launches ahead (flight.py).
"""

import pathlib
import re
import subprocess
import sys
import tempfile

import flight

HERE = pathlib.Path(__file__).resolve().parent
WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-runtime==13.0.96",
]
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
# Where a register in memory would cost what the kernel is for: both sides in 4 bits, spread latents, exact pages, products, adapters,
# prefill, sampling.
HOT = re.compile(
    r"attend_sealed_1_\d_44|attend_sealed_2_1_44|attend_sealed_wg_._._44|attend_exact_b16_.*|attend_absorbed|attend_rebuilt|linear_.*|lora_.*|prefill_.*|sample_.*|merge|absorb"
)
# Bytes a hot kernel may keep in memory, outside its loops.
SPILL = 16


def sources():
    return sorted(p for p in HERE.iterdir() if p.suffix in (".cu", ".cuh"))


def fnv(data):
    """FNV-1a, 64 bits."""
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def fingerprint():
    """Of the sources: names and bytes, in order."""
    return fnv(b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in sources()))


def compile_to(image):
    cuda = flight.installed("nvcc-13.0.88", WHEELS)
    targets = [x for a in ARCHITECTURES for x in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    command = [cuda / "bin/nvcc", "-std=c++17", "-O3", *targets, "-gencode", "arch=compute_80,code=compute_80"]
    command += ["-Xfatbin", "-compress-all", "-Xptxas", "-v", "-t", "2", "-fatbin", "-o", image, "strait.cu"]
    done = subprocess.run(command, cwd=HERE, env={"CUDA_HOME": str(cuda), "PATH": f"{cuda}/bin:/usr/bin:/bin"}, capture_output=True, text=True)
    if done.returncode or "serialized" in done.stderr:
        # The compiler only warns where it makes products of warpgroups wait for each other.
        sys.exit(done.stderr)
    table = {}
    for kernel, arch, rest in re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n(.*?)(?=ptxas info *: Compil|\Z)", done.stderr, re.S):
        registers = int(re.search(r"Used (\d+) registers", rest)[1])
        spill = int(re.search(r"(\d+) bytes spill stores", rest)[1])
        table.setdefault(kernel, {})[arch] = (registers, spill)
    return table


def report(table, image):
    lines = [f"sources {fingerprint()}", f"image {fnv(image)}", "registers, and bytes spilled after a plus; by architecture", ""]
    lines.append(f"{'kernel':<26}" + "".join(f"{f'sm_{a}':>9}" for a in ARCHITECTURES))
    for kernel, by in sorted(table.items()):
        cells = [f"{by[a][0]}+{by[a][1]}" if by[a][1] else f"{by[a][0]}" for a in ARCHITECTURES]
        lines.append(f"{kernel:<26}" + "".join(f"{c:>9}" for c in cells))
    return "\n".join(lines) + "\n"


def main():
    check = "--check" in sys.argv
    with tempfile.TemporaryDirectory() as temp:
        image = pathlib.Path(temp) / "strait.fatbin"
        table = compile_to(image)
        text = report(table, image.read_bytes())
        faults = [f"{k} spills {s} bytes on sm_{a}" for k, by in table.items() if HOT.fullmatch(k) for a, (_, s) in by.items() if s > SPILL]
        touching, walked = flight.of_image(image)
        faults += touching or ([] if walked else ["no kernel multiplies by warpgroups"])
        others, waits = flight.early(image)
        faults += others or ([] if waits else ["no kernel waits for the launches ahead"])
        if check:
            if text != (HERE / "registers.txt").read_text():
                faults.append("registers.txt is of other sources or says otherwise: run kernels/build.py and look at what changed")
            if image.read_bytes() != (HERE / "strait.fatbin").read_bytes():
                faults.append("strait.fatbin is not what these sources compile to: run kernels/build.py")
        else:
            (HERE / "strait.fatbin").write_bytes(image.read_bytes())
            (HERE / "registers.txt").write_text(text)
        print(text)
        print(f"{walked} kernels that multiply by warpgroups, every path: {len(touching)} instructions that touch a product under way")
        print(f"{waits} kernels that wait for the launches ahead: {len(others)} ask for something else before, or end without")
    if faults:
        sys.exit("\n".join(faults))


main()
