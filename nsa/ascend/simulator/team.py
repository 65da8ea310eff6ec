"""A cube core and its vector cores, which run the two halves of one program side by side.

A half waits for the other in its scalar unit. So each core is a greenlet, which stops where it has to wait and goes on
when the flag is set. If all of them wait, that is a deadlock.

A flag from the cube core is set for each vector core. One from the vector cores is set for the cube core when each of
them has set it. Flags count, up to MOST_SETS: the n-th wait takes the n-th set. All of that is the vendor's
documentation of asc_sync_block_arrive, mode 2 (asc-devkit).
"""

from collections import Counter

from greenlet import getcurrent, greenlet

from .faults import FaultError

MOST_SETS = 15  # that a flag counts


class Team:
    def __init__(self, cores):
        self._cores = cores
        self._sets = {core: Counter() for core in cores}  # how often each core has set each flag
        self._waits = {core: Counter() for core in cores}
        for core in cores:
            core.team = self

    def run(self, arguments):
        """Run all cores to their end. arguments: of each core."""
        fibres = {core: greenlet(core.run) for core in self._cores}
        waiting = {}  # core -> the operation that it waits at
        for core, fibre in fibres.items():
            waiting[core] = fibre.switch(arguments[core])
        while any(not fibre.dead for fibre in fibres.values()):
            ready = [core for core, fibre in fibres.items() if not fibre.dead and self._is_set(core, waiting[core])]
            if not ready:
                stuck = [f"{core.name}: {waiting[core]}" for core, fibre in fibres.items() if not fibre.dead]
                raise FaultError("deadlock", f"these wait for ever: {'; '.join(stuck)}")
            for core in ready:
                waiting[core] = fibres[core].switch()
        for core in self._cores:
            for other in self._others(core):
                for flag, sets in self._sets[other].items():
                    if sets > self._waits[core][flag]:
                        raise FaultError("flag left set", f"{core.name} never waited for flag {flag} of {other.name}")

    def post(self, core, flag):
        """`core` sets the flag."""
        self._sets[core][flag] += 1
        for other in self._others(core):
            if self._ahead(other, flag) > MOST_SETS:
                raise FaultError(
                    "flag set twice",
                    f"{core.name} sets flag {flag} again, which counts to {MOST_SETS}, and {other.name} has not waited",
                )

    def wait(self, core, operation):
        """Called by `core`; returns when the others have set the flag of the operation for it once more."""
        while not self._is_set(core, operation):
            getcurrent().parent.switch(operation)
        self._waits[core][operation.flag[-1]] += 1

    def _is_set(self, core, operation):
        return self._ahead(core, operation.flag[-1]) > 0

    def _ahead(self, core, flag):
        """How often the flag is set for `core`, and not waited for."""
        return min(self._sets[other][flag] for other in self._others(core)) - self._waits[core][flag]

    def _others(self, core):
        return [other for other in self._cores if other.program.core_type != core.program.core_type]
