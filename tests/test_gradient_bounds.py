"""Bounds of gradients are finite where, and only where, all entries are."""

import math

import pytest
import torch

from probae.gradient_bounds import Products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bounds_of_products_are_finite_where_all_entries_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, h = torch.randn(2, 30, dtype=dtype), torch.randn(2, 40, dtype=dtype)
    first, last = x[0, 0].clone(), h[-1, -1].clone()
    worst = math.sqrt(torch.finfo(dtype).max) * 4  # no entry is infinite, but a product of two
    not_finite = [(math.nan, last), (first, math.inf), (0.0, -math.inf), (worst, worst)]
    for a, b in [(first, last), *not_finite]:
        x[0, 0], h[-1, -1] = a, b
        h[0, 0] = worst if a == worst else 1.0
        weight = torch.zeros(30, 40, dtype=dtype, requires_grad=True)
        with Products() as products:
            (gradient,) = torch.autograd.grad(((x @ weight) * h).sum(), weight)
        (bound,) = products.bounds([gradient])
        assert bound.shape == ()
        assert bool(bound.isfinite()) == bool(gradient.isfinite().all()), (a, b)
        assert not bound.isfinite() or bound >= gradient.abs().max() * (1 - 1e-2)


def test_a_sum_of_products_is_no_product() -> None:
    weight = torch.ones(9, 9, requires_grad=True)
    x, broken = torch.ones(2, 9), torch.full((2, 9), math.nan)
    with Products() as products:
        used_twice = torch.autograd.grad((x @ weight).sum() + (broken @ weight).sum(), weight)
        a, b = torch.ones(9, 2), torch.ones(2, 9)
        changed, by_out, in_list = a @ b, a @ b, a @ b
        changed.add_(math.inf)
        torch.div(by_out, 0, out=by_out)
        torch._foreach_mul_([in_list], math.inf)
        d = torch.full((2, 9), math.nan)
        of_changed = a @ d
        d.zero_()
    for bound in products.bounds([*used_twice, changed, by_out, in_list, of_changed]):
        assert not bound.isfinite()
