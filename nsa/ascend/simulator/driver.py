"""Run kernels in the simulator, from the very HIVM that the Ascend compiler makes of them.

    kernel --Triton--> TTIR --triton-ascend--> Linalg --bishengir-compile--> HIVM --simulator--> results, traces, faults

Inside `with simulator_driver("Ascend910B3") as log:`, `kernel[grid](...)` takes CPU tensors.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver

from nsa import accelerator
from nsa.ascend import compile as pipeline
from nsa.ascend import cpu_driver
from nsa.ascend.hivm import parse
from nsa.ascend.targets import Target, find_target
from nsa.triton_ascend import lowering_options

from . import checks
from .faults import Fault, FaultError, SimulationError
from .machine import programs_of
from .run import Run, run

NAME = "ascend-simulator"


@dataclass
class Launch:
    """One launch of a kernel in the simulator. faults: of its execution and of `checks`."""

    kernel: str
    grid: tuple[int, int, int]
    run: Run
    faults: list[Fault] = field(default_factory=list)


@contextmanager
def simulator_driver(target: Target | str, check: bool = True) -> Iterator[list[Launch]]:
    """Inside, Triton kernels run on CPU tensors as on a chip; afterwards the driver that was active is so again.

    Gives a list to which every launch is appended. A kernel that cannot be compiled raises CompileError, and one in
    which something is wrong SimulationError, with all faults, after the launch. One with @triton.autotune runs with its
    first configuration. Compiled kernels are kept as `host_driver` keeps them.

    Args:
        target: a `nsa.ascend.targets.Target`, or the name of one.
        check: whether to look for what has no order, which takes about as long as to run.
    """
    driver = SimulatorDriver(find_target(target) if isinstance(target, str) else target, check)
    accelerator.machine_of.cache_clear()  # a device is another chip inside
    try:
        with cpu_driver.active(driver):
            yield driver.log
    finally:
        accelerator.machine_of.cache_clear()


class SimulatorBackend(cpu_driver.CpuBackend):
    """Ends in the generic text of HIVM."""

    name = NAME

    def __init__(self, target):
        super().__init__(target)
        self.binary_ext = "hivm"
        self.chip = find_target(target.arch)

    def parse_options(self, opts):
        return super().parse_options(opts | lowering_options(a5=self.chip.generation == "A5"))

    def last_stage(self, linalg, metadata):
        metadata["name"], metadata["shared"] = re.search(r"func\.func @(\w+)", linalg).group(1), 0
        return pipeline.to_hivm(linalg, self.chip)[1].encode()

    def hash(self):
        return f"{self.target}-{pipeline.versions()}-{Path(pipeline.__file__).read_text()}"


class SimulatorDriver(cpu_driver.CpuDriver):
    """One device, the target."""

    def __init__(self, target, check):
        super().__init__()
        self.target, self.check, self.log = target, check, []
        self.launcher_cls = _Launcher

    def get_current_target(self):
        return GPUTarget(NAME, self.target.name, 32)

    def get_current_device(self):
        return self.target.name  # under which the JIT keeps what it compiled: another target is another device

    def get_device_properties(self, device):
        cores = {"num_aicore": self.target.cube_cores, "num_vectorcore": self.target.vector_cores}
        return {"max_shared_mem": 1 << 30} | cores

    def load_binary(self, name, binary, shared, device):
        try:
            programs = programs_of(parse(binary.decode()))
        except FaultError as error:  # an operation that the simulator has not
            raise pipeline.CompileError("simulator", f"{name}: {error.fault.message}") from error
        return name, programs, 0, 0


class _Launcher:
    """Runs a kernel's programs with the arguments that Triton hands over."""

    def __init__(self, source, metadata):
        self.name, self.types = source.fn.__name__, cpu_driver.types_of_arguments(source)

    def __call__(self, x, y, z, stream, programs, packed, launch_metadata, enter_hook, exit_hook, *args):
        pairs = [(arg, type_) for arg, type_ in zip(args, self.types.values()) if type_]
        values = [cpu_driver.cpu_tensor(arg, "simulator_driver") if type_[0] == "*" else arg for arg, type_ in pairs]
        done = run(programs, values, (x, y, z), names=[name for name, type_ in self.types.items() if type_])
        driver = triton_driver.active  # not the one that was active when it was compiled
        launch = Launch(self.name, (x, y, z), done, [*done.faults, *(checks.check(done) if driver.check else ())])
        driver.log.append(launch)
        if launch.faults:
            raise SimulationError(launch)


backends[NAME] = Backend(SimulatorBackend, SimulatorDriver)
