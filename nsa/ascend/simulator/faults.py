"""What the simulator finds wrong with a kernel."""

from typing import NamedTuple

# What is checked while a program runs. `checks.CHECKS` are looked for afterwards.
OF_EXECUTION = ("access outside", "alignment", "flag set twice", "flag left set", "deadlock")


class Fault(NamedTuple):
    check: str  # which check found it
    message: str

    def __str__(self):
        return f"{self.check}: {self.message}"


class FaultError(Exception):
    """A `Fault` after which the program cannot go on."""

    def __init__(self, check, message):
        super().__init__(f"{check}: {message}")
        self.fault = Fault(check, message)


class SimulationError(RuntimeError):
    """Something is wrong with a launch: `faults` is all that was found, `launch` the `driver.Launch`."""

    def __init__(self, launch):
        super().__init__(f"{launch.kernel} on a grid of {launch.grid}:\n" + "\n".join(map(str, launch.faults)))
        self.launch, self.faults = launch, launch.faults
