"""The sizes that SDXL is told, as its pipelines give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepfusion.latents.time_ids import refiner_ids, size_ids


def test_sizes_are_in_the_order_of_diffusers() -> None:
    assert size_ids(1024, 768).tolist() == [1024, 768, 0, 0, 1024, 768]
    given = size_ids(1024, 768, original=(512, 256), crop=(8, 16), target=(640, 480))
    assert given.tolist() == [512, 256, 8, 16, 640, 480]
    assert given.dtype == torch.float32
    assert refiner_ids(1024, 768, crop=(1, 2)).tolist() == [1024, 768, 1, 2, 6]
    assert refiner_ids(8, 8, original=(5, 6), aesthetic_score=2.5).tolist() == [5, 6, 0, 0, 2.5]


def test_they_are_those_of_its_pipelines() -> None:
    diffusers = pytest.importorskip("diffusers")
    ids = diffusers.StableDiffusionXLPipeline._get_add_time_ids

    class Pipeline:
        class unet:  # noqa: N801
            class config:  # noqa: N801
                addition_time_embed_dim = 8

            class add_embedding:  # noqa: N801
                linear_1 = torch.nn.Linear(8 * 6 + 4, 1, device="meta")

    theirs = ids(Pipeline(), (512, 256), (8, 16), (640, 480), torch.float32, text_encoder_projection_dim=4)
    assert torch.equal(theirs[0], size_ids(1, 1, original=(512, 256), crop=(8, 16), target=(640, 480)))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((0, 8), {}, ValueError, "height and width must be in"),
        ((8, 8.0), {}, TypeError, "height and width must be an integer"),
        ((8, 8), {"original": 512}, TypeError, "original must be two integers"),
        ((8, 8), {"crop": (-1, 0)}, ValueError, "crop must be in"),
        ((8, 8), {"target": (1, 2, 3)}, TypeError, "target must be two integers"),
    ],
)
def test_sizes_that_are_none_are_refused(
    arguments: Any, options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        size_ids(*arguments, **options)


def test_a_score_has_bounds() -> None:
    with pytest.raises(ValueError, match="aesthetic_score"):
        refiner_ids(8, 8, aesthetic_score=11)
