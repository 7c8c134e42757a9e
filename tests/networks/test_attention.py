"""Attention by either route, against the formula in float64."""

import pytest
import torch

from stepfusion.networks import attention
from stepfusion.networks.attention import attend


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Head by head in float64 (Vaswani et al. 2017, equation 1)."""
    parts = zip(*(tokens.double().chunk(heads, dim=2) for tokens in (q, k, v)), strict=True)
    return torch.cat(
        [torch.softmax(a @ b.transpose(1, 2) / a.shape[2] ** 0.5, dim=2) @ c for a, b, c in parts], dim=2
    )


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (4, 8), (1, 256), (1, 512), (2, 256), (3, 130)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_attention_is_the_formula(heads: int, head_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (torch.randn(2, 17, heads * head_dim).to(dtype) for _ in range(3))
    out = attend(q, k, v, heads)
    assert out.shape == q.shape
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_formula(q, k, v, heads), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("head_dim", "fused"), [(128, True), (129, False), (256, False)])
def test_large_heads_go_through_matrix_products_on_a_cpu(
    head_dim: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        attention.functional, "scaled_dot_product_attention", lambda q, k, v: calls.append(q.shape) or q
    )
    q = torch.randn(1, 4, head_dim)
    attend(q, q, q, 1)
    assert calls == ([(1, 1, 4, head_dim)] if fused else [])
