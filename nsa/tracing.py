"""What PyTorch's tracers need from the ops."""

import sys

import torch
from torch._library.fake_impl import allocate_size


def unbacked_size():
    """In a fake kernel, a size that nobody knows before the run.

    `torch.library.get_ctx().new_dynamic_size()` gives the same, yet only where `capture_dynamic_output_shape_ops` is
    set; with the default setting the graph would break at each call of the op.
    """
    context = torch.library.get_ctx()
    return context.new_dynamic_size() if context._shape_env is None else allocate_size(context._shape_env)


def any_unbacked(sizes):
    """Whether one of symbolic sizes is unknown before the run. PyTorch 2.7 cannot compare sizes computed from such."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # 0.3 s, by which time a tracer has paid it

    return bool(free_unbacked_symbols(sizes))


def untraced(function):
    """The function, into which Dynamo does not look when an op runs eagerly under a compiled caller.

    As `torch.compiler.disable`, which takes more than a second to import: so not before Dynamo is there.
    """
    disabled = None

    def outer(*args, **kwargs):
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    _skip(outer.__code__)
    return outer


def _skip(code):
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "skip_code"):  # until PyTorch 2.7
        frames.skip_code(code)
    else:
        skip, default = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, default))
