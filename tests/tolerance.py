"""The one place where a tolerance comes from: the arithmetic of a sum of products, rounded once."""

import torch


def error_bound(exact, magnitude, terms, dtype):
    """Largest |computed - exact| that a correct kernel may show, element by element.

    A sum of `terms` products in precision u is off by at most gamma = terms * u / (1 - terms * u) times the
    sum of the products' absolute values, in any order (Higham, Accuracy and Stability of Numerical
    Algorithms, 3.1). Kernels sum in fp32, or fp64 for fp64, and round once to `dtype`; `exact` was summed in fp64.
    """
    u_sum = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    u_exact = torch.finfo(torch.float64).eps / 2
    summed = (_gamma(terms, u_sum) + _gamma(terms, u_exact)) * magnitude
    out = torch.finfo(dtype)
    rounded = out.eps / 2 * (exact.abs() + summed)
    subnormal = out.smallest_normal * out.eps / 2  # half the distance of two numbers next to 0
    return summed + rounded + subnormal


def split_error_bound(magnitude, terms, dtype, parts):
    """As `error_bound`, for a sum whose products are shared out among up to `parts` sums: each of these is rounded to
    `dtype`, and they are added in it.

    The parts' magnitudes add up to `magnitude`, which also bounds the sum of their absolute values: so much for what
    `error_bound` says of each. Adding n numbers in precision u is off by at most gamma of n - 1 terms times the sum of
    their absolute values, which their own errors have made larger. Subnormal numbers are added exactly.
    """
    each = error_bound(magnitude, magnitude, terms, dtype)  # of all parts but for what each has of its own:
    out = torch.finfo(dtype)
    each = each + (parts - 1) * out.smallest_normal * out.eps / 2
    return each + _gamma(parts - 1, out.eps / 2) * (magnitude + each)


def assert_close(computed, exact, magnitude, terms, parts=1):
    """Raise unless every element of `computed` is within `error_bound` of `exact` (fp64), or as infinite or NaN; of a
    sum in several parts, within `split_error_bound`."""
    assert computed.shape == exact.shape, f"shape {tuple(computed.shape)}, expected {tuple(exact.shape)}"
    bound = error_bound(exact, magnitude, terms, computed.dtype)
    if parts > 1:
        bound = split_error_bound(magnitude, terms, computed.dtype, parts)
    error = (computed.double() - exact).abs()
    same = (computed.double() == exact) | (computed.isnan() & exact.isnan())
    wrong = ~torch.where(exact.isfinite(), error <= bound, same)  # NaN for a number is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements off; at {at}: got {computed[at].item()}, "
            f"exact {exact[at].item()}, error {error[at].item():.3g}, allowed {bound[at].item():.3g}"
        )


def _gamma(terms, u):
    return terms * u / (1 - terms * u)
