"""Walks the machine code of the kernels that multiply by warpgroups (HGMMA), on every path, and names each instruction that touches registers
of a product under way: that reads or writes its sums, or writes the codes or queries it still reads. The compiler looks for that and reports some
of it; over the back edges of loops it once gave such registers away without a word, and results were wrong now and then.

And walks all kernels up to where they wait for the launches ahead: what they ask of memory before that, and that none ends without. The assembler moves
loads of what it takes for never written (nc) across that: factors of adapters that the sources ask for before the wait were asked for behind it.

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
# What an instruction's registers are to it: those that write none, that write as many as they load, and that write one, or two where their name
# says 64 or WIDE. Others are not known, and refused, as they may be of a new compiler.
WRITES_NONE = set("STS STG STL BAR BRA LDGSTS LDGDEPBAR DEPBAR MEMBAR FENCE WARPGROUP WARPSYNC ENDCOLLECTIVE EXIT PREEXIT ACQBULK R2UR BSSY BSYNC CALL RET NOP".split())
LOADS = set("LDS LDG LDC LDL".split())
WRITES_ONE = set(
    "IMAD LOP3 FADD ISETP FFMA FMUL VIADD IADD3 LEA SHF SHFL MUFU FMNMX F2FP FSEL CS2R SEL HMUL2 FSETP MOV PLOP3 S2R FCHK I2FP HADD2 IABS P2R VIMNMX "
    "VOTE B2R I2F F2I VIADDMNMX PRMT".split()
)
# What kernels ask of global memory before they wait for the launches ahead, by name: copies of weights (LDGSTS), and loads of what the host
# uploaded, of a norm's weight (LDG), of adapters' tables (LD), of factors that are read once (LDG.NA). All others ask for nothing, and none by a load
# that heeds no writes (CONSTANT: `ld_once`, or a pointer that is `__restrict__`), which the compiler may have moved there.
BEFORE_WAIT = [
    (r"linear_(few_.*|many|wg_.*)|attend_rebuilt", {"LDGSTS"}),
    (r"linear_normed_.*", {"LDGSTS", "LDG"}),
    (r"linear_worn_.*|lora_expand", {"LDGSTS", "LDG", "LD"}),
    (r"lora_shrink", {"LDG", "LD", "LDG.NA"}),
    (r"merge|attend_exact_.*|rope_append_.*", {"LDG"}),
]
# What goes on beside the launch ahead, which has waited for what it needs, and waits for that one at its end.
WAITS_LAST = re.compile(r"attend_sealed_.*")
# It only reads, and is launched by itself.
WAITS_NEVER = "probe_read"


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
    """Name of each kernel of an architecture in an image, its instructions, and where in them its labels are."""
    with tempfile.TemporaryDirectory() as temp:
        subprocess.run([tools() / "cuobjdump", "-xelf", f"sm_{architecture}", pathlib.Path(image).resolve()], cwd=temp, check=True, capture_output=True)
        for cubin in pathlib.Path(temp).glob("*.cubin"):
            text = subprocess.run([tools() / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
            for part in re.split(r"(?=\.section\s+\.text\.)", text)[1:]:
                code, labels = [], {}
                for line in part.splitlines():
                    if label := re.match(r"(\.L\w+):", line):
                        labels[label[1]] = len(code)
                    # Address, whether a condition stands before it, and the instruction.
                    elif found := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;", line):
                        code.append((found[1], bool(found[2]), found[3]))
                yield re.match(r"\.section\s+\.text\.([^,]+)", part)[1], code, labels


def after(at, code, labels):
    """The places of the instructions that may follow one."""
    _, conditional, text = code[at]
    opcode, of = operands(text)
    if opcode.startswith("EXIT") and not conditional:
        return []
    places = [at + 1]
    if opcode.startswith("BRA"):
        target = labels[re.search(r"`\((\.L\w+)\)", text)[1]]
        # A second condition stands among the operands.
        places = [target] if not conditional and len(of) == 1 and ".DIV" not in opcode else [target, at + 1]
    return [place for place in places if place < len(code)]


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


def faults(name, code, labels):
    """What a kernel does to registers of products under way, on any path through it."""
    found, seen = set(), set()
    # Where, the groups that are under way from oldest to newest, and the one that is being made: registers read, and sums.
    nothing = (frozenset(), frozenset())
    paths = [(0, (), nothing)]
    while paths:
        state = paths.pop()
        if state in seen:
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
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            most = int(re.search(r"gsb0, 0x([0-9a-f]+)", text)[1], 16)
            groups = groups[max(0, len(groups) - most):]
        else:
            writes, reads = touched(opcode, of)
            for left, sums in (*groups, making):
                if writes & (left | sums) or reads & sums:
                    found.add(f"{name}: {text} at {address} touches registers of a product under way")
        paths += [(place, groups, making) for place in after(at, code, labels)]
    return sorted(found)


def of_image(image):
    """Faults of all kernels of an image, and how many it has that were walked."""
    walked = [faults(name, code, labels) for name, code, labels in kernels(image, "90a") if any("HGMMA" in text for _, _, text in code)]
    return [fault for one in walked for fault in one], len(walked)


def before_wait(code, labels):
    """What a kernel asks of global memory before it waits for the launches ahead, by kinds; and that it ends, where it may and not have waited."""
    asks, seen, paths = set(), set(), [0]
    while paths:
        at = paths.pop()
        if at in seen:
            continue
        seen.add(at)
        opcode = code[at][2].split(" ")[0]
        if opcode.startswith("ACQBULK"):
            continue
        if opcode.startswith("EXIT"):
            asks.add("ends")
        # Prefetches (CCTL) are of the second-level cache, which all writes go through.
        if kind := re.match(r"(LDGSTS|LDG|LD|STG|ST|ATOMG|ATOM|RED|UBLKCP|UTMALDG)\b", opcode):
            asks.add("CONSTANT" if ".CONSTANT" in opcode else "LDG.NA" if ".NA" in opcode else kind[1])
        paths += after(at, code, labels)
    return asks


def early(image):
    """Kernels that ask for other things before they wait than their sources do, or end without; and how many there are that wait."""
    found, waits = [], 0
    for architecture in ("90a", "100", "120"):
        for name, code, labels in kernels(image, architecture):
            # Kernels for warpgroups are empty on other architectures, and not launched.
            if name == WAITS_NEVER or (architecture != "90a" and "_wg_" in name):
                continue
            waits += 1
            asks = before_wait(code, labels)
            want = asks - {"ends"} if WAITS_LAST.fullmatch(name) else next((asks for names, asks in BEFORE_WAIT if re.fullmatch(names, name)), set())
            if asks != want:
                found.append(f"{name} on sm_{architecture}, before it waits for the launches ahead: {sorted(asks)}, and {sorted(want)} is meant")
    return found, waits


if __name__ == "__main__":
    found, count = of_image(HERE / "strait.fatbin")
    print(f"{count} kernels that multiply by warpgroups, every path: {len(found)} instructions that touch a product under way")
    others, waits = early(HERE / "strait.fatbin")
    print(f"{waits} kernels that wait for the launches ahead: {len(others)} ask for something else before, or end without")
    if found + others or not count or not waits:
        sys.exit("\n".join((found + others)[:40]) or "none was found in the image")
