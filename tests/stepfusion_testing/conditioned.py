"""Networks with conditions, and what stands around them, small enough for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

import stepfusion as sf
from stepfusion.networks import ConditionedNetwork, ConditionSpec

TOKENS, WIDTH = 5, 6
SHAPE = (2, 4, 4)


class TextNetwork(ConditionedNetwork):
    """Attends from every pixel to a text, and adds the size of the image to the time, if it is told sizes.

    Attributes:
        prepared: how often conditions were prepared.
        batches: the batch size of every call of `predict`.
    """

    in_channels, sample_size = SHAPE[0], SHAPE[1]

    def __init__(self, *, sizes: bool = False, classes: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = classes
        self.projects_conditions = sizes
        self.time = nn.Linear(4, 8)
        self.size = nn.Linear(2, 8)
        self.label = nn.Embedding(classes or 1, 8)
        self.projection = nn.Linear(8, SHAPE[0])
        self.query = nn.Conv2d(SHAPE[0], 8, 3, padding=1)
        self.keys_values = nn.Linear(WIDTH, 16)
        self.out = nn.Linear(8, SHAPE[0])
        self.dropout = nn.Dropout(0.5)
        self.prepared = 0
        self.batches: list[int] = []

    @property
    def conditions(self) -> tuple[ConditionSpec, ...]:
        text = ConditionSpec("text", (TOKENS, WIDTH))
        return (text, ConditionSpec("sizes", (2,), integer=True)) if self.projects_conditions else (text,)

    def prepare(self, conditions: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        self.prepared += len(conditions["text"])
        text = self.keys_values(conditions["text"])
        return (text, self.size(conditions["sizes"].to(text.dtype))) if self.projects_conditions else (text,)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.float()[:, None] / torch.tensor([1.0, 10.0, 100.0, 1000.0], device=timesteps.device)
        return functional.silu(self.time(angles.sin().to(self.time.weight.dtype)))

    def condition(self, time: Tensor, class_labels: Tensor | None = None, *prepared: Tensor) -> Tensor:
        time = time + prepared[1] if self.projects_conditions else time
        time = time if class_labels is None else time + self.label(class_labels)
        return self.projection(functional.silu(time))

    def predict(self, x: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.batches.append(len(x))
        key, value = prepared[0].chunk(2, dim=-1)
        query = self.query(x + projections[:, :, None, None]).flatten(2).transpose(1, 2)
        attended = self.dropout(functional.scaled_dot_product_attention(query, key, value))
        return x + self.out(attended).transpose(1, 2).reshape(x.shape)


class Keywords(nn.Module):
    """The same as a network that is not ours, with its conditions as keyword arguments."""

    in_channels, sample_size = SHAPE[0], SHAPE[1]

    def __init__(self, network: TextNetwork) -> None:
        super().__init__()
        self.inner = network
        self.num_classes = network.num_classes

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None, **conditions: Tensor) -> Tensor:
        return self.inner(x, timesteps, labels, **conditions)


class Prompts:
    """An encoder that counts what it encodes; no prompt is zeros."""

    def __init__(self, *, sizes: bool = False) -> None:
        self.encoded: list[str | None] = []
        self._sizes = sizes

    def __call__(self, prompt: str | None) -> dict[str, Tensor]:
        self.encoded.append(prompt)
        if prompt == "not a text":
            raise ValueError("prompt cannot be encoded")
        return text_condition(prompt) | ({"sizes": torch.tensor([4, 4])} if self._sizes else {})


def text_condition(prompt: str | None) -> dict[str, Tensor]:
    """The tensors of a prompt."""
    seed = int.from_bytes(hashlib.sha256((prompt or "").encode()).digest()[:4], "big")
    text = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return {"text": torch.zeros_like(text) if prompt is None else text}


def text_engine(model: nn.Module | None = None, *, sizes: bool = False, **arguments: object) -> sf.Engine:
    """An engine of a network that takes texts, on a CPU by default."""
    model = TextNetwork(sizes=sizes).eval() if model is None else model
    known = {"device": "cpu", "backend": "reference", "network": "eager", "prompts": Prompts(sizes=sizes)}
    return sf.Engine(model, sf.NoiseSchedule.linear(100), **{**known, **arguments})  # type: ignore[arg-type]
