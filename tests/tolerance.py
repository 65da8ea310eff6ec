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


def error_bound_of_parts(exact, magnitude, terms, dtype):
    """As `error_bound`, of a sum of parts that were each summed and rounded to `dtype`, and then added in `dtype`.

    `exact` and `magnitude` are lists with an element for each part, `terms` is the largest number in one of them.
    """
    parts = sum(error_bound(e, m, terms, dtype) for e, m in zip(exact, magnitude))
    u = torch.finfo(dtype).eps / 2
    return parts + _gamma(len(exact) - 1, u) * (sum(e.abs() for e in exact) + parts)


def assert_close(computed, exact, magnitude, terms):
    """Raise unless every element of `computed` is within `error_bound` of `exact` (fp64), or as infinite or NaN."""
    assert_within(computed, exact, error_bound(exact, magnitude, terms, computed.dtype))


def assert_within(computed, exact, bound):
    """Raise unless every element of `computed` is within `bound` of `exact` (fp64), or as infinite or NaN."""
    assert computed.shape == exact.shape, f"shape {tuple(computed.shape)}, expected {tuple(exact.shape)}"
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
