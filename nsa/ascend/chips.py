"""`python -m nsa.ascend.chips > nsa/ascend/chips.csv`: all chips that the installed Ascend compiler knows.

The names are those of `bishengir-compile --help`. Core counts and sizes in bytes are what the compiler writes into
the header of a module that it compiles for the chip.
"""

import csv
import io
import re
import subprocess
import sys

from .compile import tool
from .hivm import header_of, parse

FIELDS = {"cube_cores": "CUBE_CORE_COUNT", "vector_cores": "VECTOR_CORE_COUNT"}  # our name: the header's
MEMORIES = {memory: f"{memory.upper()}_SIZE" for memory in ("ub", "l1", "l0a", "l0b", "l0c")}  # there in bits
TOOLS = ("", "-a5")  # suffixes of the compiler's programs: for A2 and A3, and for A5


def names():
    """The names, in the compiler's order."""
    said = subprocess.run([tool("bishengir-compile"), "--help"], capture_output=True, text=True, check=True).stdout
    return list(dict.fromkeys(re.findall(r"^ +=(Ascend\S+)", said, re.MULTILINE)))


def described(name, tools):
    """The chip as one of TOOLS describes it: {"cube_cores": 24, ..., "l0c": 131072}; None if they do not know it."""
    command = [tool(f"bishengir-opt{tools}"), "-", "--mlir-print-op-generic"]
    command += [f"--hacc-append-device-spec=target={name}"]
    said = subprocess.run(command, input="module {}", capture_output=True, text=True)
    if said.returncode:
        return None
    header = header_of(parse(said.stdout))
    if header["UB_SIZE"] < 0:  # the first tools know the names of A5 chips, and no sizes
        return None
    counts = {field: header[entry] for field, entry in FIELDS.items()}
    return counts | {memory: header[entry] // 8 for memory, entry in MEMORIES.items()}


def table():
    """The text of chips.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["name", *FIELDS, *MEMORIES], lineterminator="\n")
    writer.writeheader()
    for name in names():
        found = next(filter(None, (described(name, tools) for tools in TOOLS)))
        writer.writerow({"name": name} | found)
    return text.getvalue()


if __name__ == "__main__":
    sys.stdout.write(table())
