"""nsa.gpu where it cannot work."""

import subprocess
import sys


def test_gpu_report_with_triton_ascend_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "-m", "nsa.gpu", "report"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "nsa.gpu: expected community Triton, which compiles for GPUs, got triton-ascend: "
        "install nsa-ascend[cuda] in an environment of its own"
    ]
