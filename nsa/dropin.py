"""For code written for torch_npu: the vendor's backward signature, and ours in the place of the vendor's functions.

docs/migration.md says what differs. Importing this module changes nothing in torch_npu.
"""

from threading import Lock

import torch

from .api import checked, nsa_compress, nsa_compress_infer
from .autocast import seen_dtype
from .contract import PUBLIC_DTYPES, check_layout, check_tensors
from .segments import is_plain, overload_for
from .types import AnyInt, Int, Lengths


def nsa_compress_grad(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    compress_block_size: Int,
    compress_stride: Int,
    *,
    actual_seq_len: Lengths[AnyInt],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both gradients of `nsa.nsa_compress` at once, by the signature of torch_npu.npu_nsa_compress_grad.

    Args:
        grad: (T', N, D), the gradient of the compression's result; dtype and device of `input`.
        input, weight, compress_block_size, compress_stride, actual_seq_len: as in `nsa.nsa_compress`.

    Returns:
        (dInput (T, N, D), dWeight (compress_block_size, N)), contiguous, dtype of `input`.

    Raises:
        TypeError, RuntimeError: as `nsa.nsa_compress`; `grad`, which messages call grad_output, is no Tensor, or
            its dtype, shape or device is another than that of the compression's result.
    """
    check_tensors("input", input, "weight", weight, PUBLIC_DTYPES, seen_dtype)
    check_tensors("grad_output", grad, "input", input, PUBLIC_DTYPES, seen_dtype)
    block, stride, ends = checked(compress_block_size, compress_stride, actual_seq_len, is_plain(input))
    for name, tensor in (("grad_output", grad), ("input", input), ("weight", weight)):
        check_layout(name, tensor)
    ops = torch.ops.nsa.nsa_compress_grad_input, torch.ops.nsa.nsa_compress_grad_weight
    dx, dw = (
        overload_for(op, ends)(grad, factor, block, stride, actual_seq_len=ends)
        for op, factor in zip(ops, (weight, input))
    )
    return dx, dw


OURS = {
    "npu_nsa_compress": nsa_compress,
    "npu_nsa_compress_grad": nsa_compress_grad,
    "npu_nsa_compress_infer": nsa_compress_infer,
}
REQUIRED = ("npu_nsa_compress", "npu_nsa_compress_grad")  # the third came later

_lock = Lock()
_standing = set()  # replacements that are not restored yet
_vendors = {}  # while there are any, the vendor's functions by name


def replace_torch_npu() -> "Replacement":
    """Put `nsa.nsa_compress`, `nsa_compress_grad` and, if torch_npu has such a function, `nsa.nsa_compress_infer` in
    the place of torch_npu's, from now on.

        with replace_torch_npu():   # until the end of the block, also by an exception
            model(x)                # calls torch_npu.npu_nsa_compress

        replacement = replace_torch_npu()   # until replacement.restore()

    It holds for the whole process. Where several overlap, the vendor's functions come back with the end of the last.

    Returns:
        `Replacement`.

    Raises:
        RuntimeError: torch_npu is not installed, or lacks one of the first two functions.
    """
    try:
        import torch_npu
    except ModuleNotFoundError as error:
        if error.name != "torch_npu":  # it is there, and what it imports is missing
            raise
        raise RuntimeError(
            "expected the package torch_npu, whose functions are to be replaced: not installed"
        ) from error
    missing = [name for name in REQUIRED if not hasattr(torch_npu, name)]
    if missing:
        version = getattr(torch_npu, "__version__", "of unknown version")
        raise RuntimeError(
            f"expected torch_npu with {' and '.join(REQUIRED)}, got {version} without {' and '.join(missing)}"
        )
    with _lock:
        if not _standing:
            _vendors.update({name: getattr(torch_npu, name) for name in OURS if hasattr(torch_npu, name)})
            for name in _vendors:
                setattr(torch_npu, name, OURS[name])
        replacement = Replacement(torch_npu)
        _standing.add(replacement)
    return replacement


class Replacement:
    """What `replace_torch_npu` began; the end of a `with` block, or `restore()`, ends it."""

    def __init__(self, module):
        self._module = module
        self._entered = False

    def restore(self) -> None:
        """End it; a second call does nothing."""
        with _lock:
            if self not in _standing:
                return
            _standing.remove(self)
            if not _standing:
                for name, function in _vendors.items():
                    if getattr(self._module, name) is OURS[name]:  # else somebody has put a third one there since
                        setattr(self._module, name, function)
                _vendors.clear()

    def __enter__(self) -> "Replacement":
        if self._entered or self not in _standing:
            raise RuntimeError(
                "expected a replacement that was not entered or restored before: call replace_torch_npu() once a block"
            )
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
