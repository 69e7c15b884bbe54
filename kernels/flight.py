"""Walks the machine code of kernels on every path, for what no emulation shows.

Of those that multiply by warpgroups (HGMMA) it names each instruction that touches registers of a product under way: that reads or writes its
sums, or writes the codes or queries it still reads. The compiler looks for that and reports some of it; over the back edges of loops it once gave
such registers away without a word, and results were wrong now and then.

Of all that may begin before the launch ahead has ended it names each load that heeds no writes (`ld_once`, or a pointer that is `__restrict__`)
ahead of where the kernel waits: the compiler takes what such a load reads for something nobody writes, and may move it there. And each end that a
kernel may come to without having waited, as who waits for it would not have waited for those ahead of it.

    python3 kernels/flight.py           of the image that is committed
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import venv

HERE = pathlib.Path(__file__).resolve().parent
WHEELS = ["nvidia-cuda-nvdisasm==13.5.37", "nvidia-cuda-cuobjdump==13.5.37"]
# Architectures whose launches may begin before the one ahead has ended; kernels that read sealed pages before they wait, as nothing that they
# may overlap writes any (common.cuh); and one that never waits, as it only reads, and is launched by itself.
OVERLAP = ["90a", "100", "120"]
READS_EARLY = re.compile(r"attend_sealed_.*")
WAITS_NEVER = "probe_read"
# What an instruction's registers are to it: those that write none, that write as many as they load, and that write one, or two where their name
# says 64 or WIDE. Others are not known, and refused, as they may be of a new compiler.
WRITES_NONE = set("STS STG STL BAR BRA LDGSTS LDGDEPBAR DEPBAR MEMBAR FENCE WARPGROUP WARPSYNC ENDCOLLECTIVE EXIT PREEXIT ACQBULK R2UR BSSY BSYNC CALL RET NOP".split())
LOADS = set("LDS LDG LDC LDL".split())
WRITES_ONE = set(
    "IMAD LOP3 FADD ISETP FFMA FMUL VIADD IADD3 LEA SHF SHFL MUFU FMNMX F2FP FSEL CS2R SEL HMUL2 FSETP MOV PLOP3 S2R FCHK I2FP HADD2 IABS P2R VIMNMX "
    "VOTE B2R I2F F2I VIADDMNMX PRMT".split()
)


def installed(name, wheels):
    """NVIDIA's files of some wheels, in a folder of that name under target, installed once."""
    home = HERE.parent / "target" / name
    if not (home / "ready").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([home / "bin/pip", "install", "-q", *wheels], check=True)
        (home / "ready").touch()
    return next(home.glob("lib/python*/site-packages/nvidia/cu13"))


def tools():
    """The folder with the disassembler."""
    return installed("nvdisasm-13.5.37", WHEELS) / "bin"


def kernels(image, architecture):
    """Name and lines of each kernel of an architecture in an image."""
    with tempfile.TemporaryDirectory() as temp:
        command = [tools() / "cuobjdump", "-xelf", f"sm_{architecture}", pathlib.Path(image).resolve()]
        subprocess.run(command, cwd=temp, check=True, capture_output=True)
        for cubin in pathlib.Path(temp).glob("*.cubin"):
            text = subprocess.run([tools() / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
            for part in re.split(r"(?=\.section\s+\.text\.)", text)[1:]:
                yield re.match(r"\.section\s+\.text\.([^,]+)", part)[1], part.splitlines()


def registers(operand, width=1):
    """Those an operand names: of so many neighbours, or of two where it says so."""
    found = set()
    for first, wide in re.findall(r"\bR(\d+)(\.64)?", operand):
        found.update(range(int(first), int(first) + (2 if wide else width)))
    return found


def operands(text):
    """Opcode with its modifiers, and operands, of an instruction without its predicate."""
    opcode, _, rest = text.partition(" ")
    return opcode, [x.strip() for x in re.split(r",(?![^\[]*\])", rest)]


def touched(opcode, of):
    """Registers an instruction writes, and those it reads."""
    name = opcode.split(".")[0]
    width = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    if name in WRITES_NONE:
        return set(), set().union(*(registers(x, 1 if "[" in x else width) for x in of))
    if name.startswith("U") or name in ("S2UR",):
        return set(), set()
    if name not in LOADS | WRITES_ONE:
        sys.exit(f"{opcode} is not known to kernels/flight.py")
    # A condition that is made beside a number stands first.
    if re.match(r"!?U?P(T|\d)", of[0]) and len(of) > 1:
        of = of[1:] if re.match(r"R(Z|\d)", of[1]) and name in ("SHFL", "LOP3", "IADD3", "VIADD") else ["", *of[1:]]
    two = "WIDE" in opcode or ".64" in opcode or (name == "CS2R" and ".32" not in opcode)
    writes = registers(of[0], width if name in LOADS else 2 if two else 1)
    reads = set().union(*(registers(x) for x in of[1:]))
    if "WIDE" in opcode:
        reads |= registers(of[-1], 2)
    return writes, reads


def parsed(lines):
    """Address, whether it has a condition, and text of each instruction; and the place of each label."""
    code, labels = [], {}
    for line in lines:
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif text := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;", line):
            code.append((text[1], bool(text[2]), text[3]))
    return code, labels


def goes_on(code, labels, at):
    """Where the instruction at a place may lead."""
    _, conditional, text = code[at]
    opcode, of = operands(text)
    if opcode.startswith("EXIT") and not conditional:
        return []
    if not opcode.startswith("BRA"):
        return [at + 1]
    to = labels[re.search(r"`\((\.L\w+)\)", text)[1]]
    # A second condition stands among the operands.
    return [to] if not conditional and len(of) == 1 and ".DIV" not in opcode else [to, at + 1]


def early(name, lines):
    """What a kernel may come to on some path before it has waited for the launches ahead: loads that heed no writes, and its end."""
    code, labels = parsed(lines)
    found, seen, paths = set(), set(), [0]
    while paths:
        at = paths.pop()
        if at in seen or at >= len(code):
            continue
        seen.add(at)
        address, conditional, text = code[at]
        if text.startswith("ACQBULK") and not conditional:
            continue
        if text.startswith("EXIT"):
            found.add(f"{name}: ends at {address} and may not have waited for the launches ahead")
        if text.startswith("LDG") and ".CONSTANT" in text and not READS_EARLY.fullmatch(name):
            found.add(f"{name}: {text} at {address} reads before the launches ahead are waited for")
        paths += goes_on(code, labels, at)
    return sorted(found)


def faults(name, lines):
    """What a kernel does to registers of products under way, on any path through it."""
    code, labels = parsed(lines)
    found, seen = set(), set()
    # Where, the groups that are under way from oldest to newest, and the one that is being made: registers read, and sums.
    nothing = (frozenset(), frozenset())
    paths = [(0, (), nothing)]
    while paths:
        state = paths.pop()
        if state in seen or state[0] >= len(code):
            continue
        seen.add(state)
        at, groups, making = state
        address, _, text = code[at]
        opcode, of = operands(text)
        if opcode.startswith("HGMMA"):
            columns = int(re.search(r"64x(\d+)x", opcode)[1])
            sums = registers(of[0], columns // 2)
            left = registers(of[1], 4) if of[1].startswith("R") and of[1] != "RZ" else set()
            if any(left & before for _, before in groups):
                found.add(f"{name}: {text} at {address} reads sums of a product under way")
            making = (making[0] | left, making[1] | sums)
            if "gsb0" in text:
                groups, making = groups + (making,), nothing
            paths.append((at + 1, groups, making))
            continue
        if opcode.startswith("WARPGROUP.DEPBAR"):
            most = int(re.search(r"gsb0, 0x([0-9a-f]+)", text)[1], 16)
            paths.append((at + 1, groups[max(0, len(groups) - most):], making))
            continue
        writes, reads = touched(opcode, of)
        for left, sums in (*groups, making):
            if writes & (left | sums) or reads & sums:
                found.add(f"{name}: {text} at {address} touches registers of a product under way")
        paths += [(to, groups, making) for to in goes_on(code, labels, at)]
    return sorted(found)


def of_image(image):
    """Faults of all kernels of an image, and how many were walked for products of warpgroups, and how many for what they read early."""
    found, products, waits = [], 0, 0
    for architecture in OVERLAP:
        for name, lines in kernels(image, architecture):
            if any("HGMMA" in line for line in lines):
                found += faults(name, lines)
                products += 1
            # Of other architectures kernels for warpgroups are empty, and not launched.
            if name != WAITS_NEVER and (architecture == "90a" or "_wg_" not in name):
                found += [f"sm_{architecture}: {fault}" for fault in early(name, lines)]
                waits += 1
    return found, products, waits


def told(products, waits, found):
    """What was walked, in words."""
    return f"{products} kernels that multiply by warpgroups and {waits} that wait for launches ahead, every path: {len(found)} faults"


if __name__ == "__main__":
    found, products, waits = of_image(HERE / "strait.fatbin")
    print(told(products, waits, found))
    if found or not products or not waits:
        sys.exit("\n".join(found[:40]) or "none was found in the image")
