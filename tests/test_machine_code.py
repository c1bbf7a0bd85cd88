"""The machine code of the loops: from its load to its store, a vector is not on the stack.

Where it does, the bits are right, and on some processors the speed too; on others a load that is
wider than the stores before it waits for them, half of the time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec

import pytest

# There at every level; compilers may make parts of them functions of their own.
LOOPS = [
    "update_float16",
    "update_bfloat16",
    "update_float32",
    "update_float32_wide",
    "update_float64",
    "narrow_to_float16",
    "narrow_to_bfloat16",
    "narrow_to_float32",
    "swap",
]
# The registers of a level's vectors; compilers may prefer the smaller ones of AVX-512.
REGISTERS = {"baseline": "xmm", "avx2": "ymm", "avx512": "[yz]mm"}

# "  7d80:	vmovdqu %ymm0,-0x800(%rdx)"; at its end, a comment may follow.
LINE = re.compile(r"^ *([0-9a-f]+):\t(\S+) *(.*)$")
# "1234 <..._cpu_4avx2__update_halves>", of a call.
OTHER = re.compile(r"<\S*__(update|narrow|swap)[^+]*>$")
# "%ymm0,-0x40(%rsp)", whose last operand is written to; a mask may follow it.
TO_STACK = re.compile(r"%[xyz]mm\d+.*,[^,(]*\(%r[sb]p\b[^)]*\)({%k\d})?$")


def code_of(level):
    """The instructions of each function of a level: address, operation, operands."""
    spec = find_spec(f"asgd_fast._cpu.{level}")
    if spec is None:
        pytest.skip(f"the build lacks {level}")
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", spec.origin],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if "x86-64" not in text:
        pytest.skip("not code of x86-64")
    functions = {}
    for part in text.split("\n\n"):
        head, _, body = part.strip().partition("\n")
        name = re.search(r"<\S*?_cpu_\d+[a-z0-9]+__(\w+)(\.\S+)?>:$", head)
        if name:
            lines = [LINE.match(line) for line in body.splitlines()]
            found = [(int(x[1], 16), x[2], x[3]) for x in lines if x]
            functions[name[1]] = found + functions.get(name[1], [])
    if not functions:
        pytest.skip("the build has no symbols")
    return functions


def in_loops(code):
    """The instructions that can run again: from which a way through the code leads back to them."""
    places = {address: i for i, (address, _, _) in enumerate(code)}
    ways = []
    for i, (_, operation, operands) in enumerate(code):
        after = [] if operation.startswith(("ret", "jmp", "ud2")) else [i + 1]
        target = re.match(r"([0-9a-f]+) <", operands) if operation.startswith("j") else None
        if target and int(target[1], 16) in places:
            after.append(places[int(target[1], 16)])
        ways.append([j for j in after if j < len(code)])

    back = [[] for _ in code]
    for i, after in enumerate(ways):
        for j in after:
            back[j].append(i)

    def reachable(start, ways):
        seen, todo = set(), [start]
        while todo:
            i = todo.pop()
            if i not in seen:
                seen.add(i)
                todo += ways[i]
        return seen

    # Only a jump backward closes a loop; not each does.
    loops = set()
    for i, after in enumerate(ways):
        for head in after:
            if head <= i and head not in loops:
                body = reachable(head, ways) & reachable(head, back)
                if i in body:
                    loops |= body
    return [code[i] for i in sorted(loops)]


@pytest.mark.heavy  # and where lines are traced, the code is other code
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@pytest.mark.parametrize("level", REGISTERS)
def test_no_vector_goes_through_the_stack(level):
    functions = code_of(level)
    assert set(LOOPS) <= set(functions)
    for name, code in functions.items():
        if not name.startswith(("update", "narrow", "swap")):
            continue
        if level == "baseline" and any(x.startswith("call") for _, x, _ in code):
            continue  # of a fused multiply-add, around which no vector stays in a register
        loops = in_loops(code)
        if not loops:
            assert any(OTHER.search(operands) for _, _, operands in code), name
            continue
        through_stack = [
            f"{operation} {operands}"
            for _, operation, operands in loops
            if TO_STACK.search(operands)
        ]
        assert not through_stack, name
        # Or "vcvtpd2psy (%rdi),%xmm0", whose vector is that in memory.
        texts = [f"{operation} {operands}" for _, operation, operands in loops]
        assert any(re.search(rf"{REGISTERS[level]}|^\w+y ", text) for text in texts), name
