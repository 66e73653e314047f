"The simplex ETF and its directions, over a grid of sizes."

import pytest
import torch

from ngc_etf.simplex import (
    canonical_direction,
    centring,
    check_classes,
    haar_direction,
    simplex_etf,
    standard_etf,
)

SIZES = [(2, 2), (2, 7), (3, 3), (10, 10), (10, 64), (100, 128)]


@pytest.mark.parametrize("C, d", SIZES)
@pytest.mark.parametrize("dtype, eps", [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
def test_an_etf_in_any_direction(C, d, dtype, eps):
    "Equations 1 and 17, whatever the direction."
    g = torch.Generator().manual_seed(0)
    want = centring(C, dtype) * C / (C - 1)
    for U in (canonical_direction(d, C, dtype), haar_direction(d, C, g, dtype)):
        M = simplex_etf(C, d, U, alpha=3.0)
        assert (M.shape, M.dtype) == ((d, C), dtype)
        assert (U.mT @ U - torch.eye(C, dtype=dtype)).abs().max() < eps
        assert (M.mT @ M / 9 - want).abs().max() < eps
    assert (standard_etf(C, dtype).norm() - 1).abs() < eps


def test_differentiable_in_the_direction():
    U = haar_direction(5, 3, torch.Generator().manual_seed(0), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda U: simplex_etf(3, U=U), U)


def test_a_haar_direction_is_reproducible():
    a, b, c = (haar_direction(7, 4, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.dtype == torch.get_default_dtype()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: check_classes(1), "at least 2 classes, got C=1"),
        (lambda: canonical_direction(3, 4), "d=3 and C=4.*project the features"),
        (lambda: haar_direction(3, 4), "d=3 and C=4.*project the features"),
        (lambda: simplex_etf(4, d=3), "d=3 and C=4"),
        (lambda: simplex_etf(4, U=torch.eye(7, 3)), r"shape \(d, 4\), got \(7, 3\)"),
        (lambda: simplex_etf(4, d=6, U=torch.eye(7, 4)), r"shape \(6, 4\), got \(7, 4\)"),
        (lambda: simplex_etf(4, alpha=0.0), "positive and finite, got alpha=0"),
        (lambda: simplex_etf(4, alpha=float("nan")), "positive and finite, got alpha=nan"),
        (lambda: simplex_etf(4, alpha=float("inf")), "positive and finite, got alpha=inf"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_values_are_needed():
    assert simplex_etf(4, 7, device="meta").shape == (7, 4)
    assert haar_direction(7, 4, device="meta").shape == (7, 4)
    with torch.device("meta"):  # as a model is made whose weights come from a file
        assert haar_direction(7, 4).is_meta
