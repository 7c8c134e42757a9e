"""``stepfusion show model``: what is known of a model, and of what stands around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from stepfusion.checkpoints.load import load_model
from stepfusion.execution.decoder import decoded_shape
from stepfusion.latents.autoencoder import LatentDecoder, LatentEncoder
from stepfusion.latents.prompts import NoPrompts, PromptConditions
from stepfusion.model_spec import ModelSpec


def print_model(source: str) -> None:
    """Print what is known of a model, a line each.

    Raises:
        CheckpointError: it cannot be read. ValueError: the network does not say the size of its images.
    """
    model = load_model(source)
    spec = model.spec
    weights = _count(model.network.state_dict().values())
    print(f"{'model':<12} {source}\n{'network':<12} {type(model.network).__name__}, {weights}")
    for name, text in (*_facts(spec), *_around(model.around(spec), spec)):
        print(f"{name:<12} {text}")


def _facts(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    yield "path", f"{spec.schedule.name}, the network returns {spec.prediction}"
    if spec.num_classes is not None:
        null = "no null label" if spec.null_label is None else f"the null label is {spec.null_label}"
        names = f": {', '.join(spec.class_names[:12])}" if spec.class_names else ""
        yield "classes", f"{spec.num_classes}, {null}{names}"
    if spec.conditions:
        yield "conditions", ", ".join(f"{one.name} {list(one.shape)}" for one in spec.conditions)


def _around(around: Mapping[str, object], spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """The images, and the parts of a latent model."""
    decode, encode, prompts = (around.get(name) for name in ("decode", "encode_images", "prompts"))
    if not isinstance(decode, LatentDecoder):
        yield "images", _shown(spec.shape)
    else:
        yield "images", f"{_shown(decoded_shape(decode, spec.shape))}, of latents {_shown(spec.shape)}"
        space = decode.space
        parts = f"decoder of {_count(decode.state_dict().values())}"
        if isinstance(encode, LatentEncoder):
            parts += f", encoder of {_count(encode.state_dict().values())}"
        yield "autoencoder", f"{space.factor} pixels a latent pixel, scaling {space.scaling:g}; {parts}"
    if isinstance(prompts, NoPrompts):
        yield "text encoder", f"none: {prompts.missing}"
    if isinstance(prompts, PromptConditions):
        made = ", ".join(f"{name} {list(shape)}" for name, shape in prompts.text.shapes.items())
        tensors = (value for _, value in prompts.text.contents() if isinstance(value, Tensor))
        yield (
            "text encoder",
            f"a prompt of {next(iter(prompts.text.shapes.values()))[0]} tokens to {made}; {_count(tensors)}",
        )


def _count(tensors: Iterable[Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in tensors):,} weights"


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
