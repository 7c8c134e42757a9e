"""The context vectors of networks that take one, or a label in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion import _checks


def context_vectors(labels: Tensor | None, like: Tensor, size: int) -> Tensor:
    """The context vectors [B, size] that labels, contexts or None stand for, in the dtype of `like` [B, ...].

    Label ``k < size`` stands for the vector with a one at entry k; any other, and None, for zeros.

    Raises:
        ValueError: labels are neither int64 [B] nor contexts [B, size] in that dtype.
    """
    batch = like.shape[0]
    if labels is None:
        return like.new_zeros(batch, size)
    if labels.dtype == torch.int64 and list(labels.shape) == [batch]:
        return (labels[:, None] == torch.arange(size, device=labels.device)).to(like.dtype)
    if labels.dtype == like.dtype and list(labels.shape) == [batch, size]:
        return labels
    accepted = f"int64 [{batch}] or {str(like.dtype).removeprefix('torch.')} [{batch}, {size}]"
    raise ValueError(f"labels is {_checks.describe(labels)}; accepted is {accepted}")
