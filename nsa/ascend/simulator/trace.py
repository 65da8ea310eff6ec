"""What a core did: its operations in the order in which its scalar unit issued them.

`checks` reads a trace to find what has no order, `clock` to find how long it takes.
"""

from dataclasses import dataclass, field

PIPES = ("S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX")


@dataclass(slots=True)
class Operation:
    """One entry of a pipe's queue.

    kind: "run" is an instruction, or a load or store of the scalar unit; "set", "wait" and "barrier" are
    synchronisation of a core's pipes, "team set" and "team wait" of the cores of a block.
    reads, writes: `View`s. work: ((instruction, amount), ...), the work that `clock` turns into time.
    flag: (setting pipe, waiting pipe, event) of "set" and "wait"; ("team", number) between cores.
    scalar: operations of the scalar unit between the operation before and this one.
    same: whether it wrote to global memory what was there already, as the second of two cores does that do the same.
    """

    kind: str
    pipe: str  # "ALL" in a barrier of all pipes
    name: str
    line: int  # of the generic text
    reads: tuple = ()
    writes: tuple = ()
    work: tuple = ()
    flag: tuple | None = None
    scalar: int = 0
    same: bool = False

    def __str__(self):
        flag = f"[{', '.join(map(str, self.flag))}]" if self.flag else ""
        return f"{self.name}{flag} on {self.pipe}, line {self.line}"


@dataclass
class Trace:
    """Of one core: `issued` in the order of the program, `ran` in the order in which the pipes took them.

    core_type: "AIC" or "AIV". A block of a mix kernel has a cube core and two vector cores, of sub-block 0 and 1.
    """

    block: int
    core_type: str = "AIC"
    sub_block: int = 0
    issued: list = field(default_factory=list)
    ran: list = field(default_factory=list)
