"""What the snippets of each page find when they run in the tests: names, files, a server, and what is made small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import stepfusion as sf
from stepfusion_testing.edm_forward import Architecture, random_state
from stepfusion_testing.networks import labelled, smooth, tiny_unet
from stepfusion_testing.walking import stand_in

Names = dict[str, Any]
Changes = dict[str, str]
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
STYLED = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # the weight that the LoRA files change


@dataclass(frozen=True)
class Stage:
    """Of one page.

    Attributes:
        set_up: makes files in the working directory; gives the names that snippets find, and what is written
            otherwise, so that it is small or finds a server.
        before: what gives further names to a snippet or command, by its beginning, just before it runs; it is given
            the names so far.
        check: looks at the names when all snippets have run.
    """

    set_up: Callable[[], AbstractContextManager[tuple[Names, Changes]]]
    before: Mapping[str, Callable[[Names], Names]] = field(default_factory=dict)
    check: Callable[[Names], None] = lambda names: None


def fetch(words: list[str]) -> bytes:
    """What a ``curl`` command gets, written where ``>`` says; it must be a success."""
    import httpx2

    url = next(word for word in words[1:] if word.startswith("http"))
    headers = dict(words[place + 1].split(": ") for place, word in enumerate(words) if word == "-H")
    body = words[words.index("-d") + 1] if "-d" in words else None
    known = {"-H", "-d", "-N", ">", "--fail", "--silent", "--retry", "--retry-all-errors", "--retry-delay"}
    assert {word for word in words if word.startswith(("-", ">"))} <= known, words
    response = httpx2.request("GET" if body is None else "POST", url, headers=headers, content=body, timeout=60)
    assert response.status_code == 200, response.text
    if ">" in words:
        Path(words[-1]).write_bytes(response.content)
    return response.content


def picture(path: str, size: tuple[int, int], mode: str = "L") -> None:
    """A picture of one colour."""
    Image.new(mode, size, 128).save(path)


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _changed(changes: Changes) -> Callable[[], AbstractContextManager[tuple[Names, Changes]]]:
    return lambda: nullcontext(({}, changes))


# README.md


def _readme() -> AbstractContextManager[tuple[Names, Changes]]:
    picture("photo.png", (32, 32), "RGB")
    for name in ("cats", "dogs"):
        (Path("DATA") / name).mkdir(parents=True)
        for number in range(8):
            picture(f"DATA/{name}/{number}.png", (8, 8))
    return nullcontext(({"my_network": smooth}, {"512x768": "16x24", "3, 32, 32": "3, 4, 4"}))


def _literature(names: Names) -> Names:
    # image 3 of seed 7, alone, as the page says; another bucket, so to rounding
    torch.testing.assert_close(names["again"][0], names["images"][3], rtol=0, atol=1e-3)
    assert names["restored"].shape == names["images"].shape == (8, 1, 28, 28)
    images = torch.zeros(2, 3, 4, 4)
    given = {"schedule": sf.NoiseSchedule.linear(), "model": smooth, "t": torch.tensor([3, 999])}
    return {**given, **dict.fromkeys(("x_start", "noise", "z"), images)}


def _other_paths(names: Names) -> Names:
    def network(x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return 0.1 * x

    return {"raw_network": network, "velocity": network}


def _engine_with_classes(names: Names) -> Names:
    schedule = sf.NoiseSchedule.linear(100)
    return {
        "engine": sf.Engine(
            labelled,
            schedule,
            shape=(1, 28, 28),
            num_classes=11,
            null_label=10,
            class_names=CLASSES,
            device="cpu",
            batch=4,
        )
    }


def _stable_diffusion(path: str, names: Names) -> Names:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from stepfusion_testing.stable_diffusion import save_stable_diffusion

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_stable_diffusion(Path(path))
    return {}


def _check_readme(names: Names) -> None:
    assert set(names["step"]) == {"sample", "pred_xstart"}
    assert names["loss"].ndim == 0
    assert names["churned"].shape == (4, 3, 4, 4)
    assert names["result"].images.shape == (2, 1, 28, 28)


# Pages of docs/


def _edm() -> AbstractContextManager[tuple[Names, Changes]]:
    file = Path("edm-cifar10-32x32-cond-vp.safetensors")
    weights = Architecture(16, 16, (1, 2), 1, frozenset({8}), classes=4)
    save_file({f"model.{key}": value for key, value in random_state(weights).items()}, file)
    file.with_suffix(".json").write_text('{"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80}')
    return nullcontext(({}, {"(256, 512, 1024)": "(8, 16, 32)"}))


def _policy(names: Names) -> Names:
    network = sf.networks.UNet1D(2, global_cond_dim=40, down_dims=(8, 16, 32), kernel_size=5, sample_size=16)
    given = {"x": torch.zeros(3, 2, 16), "timesteps": torch.zeros(3, dtype=torch.int64)}
    return {"weights": network.state_dict(), "observation": torch.zeros(3, 40), **given}


def _inputs_of_the_bundle(names: Names) -> Names:
    x, timesteps = torch.zeros(3, 1, 28, 28), torch.zeros(3, dtype=torch.int64)
    return {"x": x, "timesteps": timesteps, "labels": torch.tensor([1, 2, 3])}


def _check_export(names: Names) -> None:
    assert names["out"].shape == (3, 1, 28, 28)
    torch.testing.assert_close(names["x"], names["images"], rtol=0, atol=0)


@contextmanager
def _http() -> Iterator[tuple[Names, Changes]]:
    from stepfusion.serving import AsyncEngine
    from stepfusion.serving.http.app import make_app
    from stepfusion_testing.http_service import served_here, until

    picture("shoe.png", (28, 28))
    picture("mask.png", (28, 28), "RGBA")
    engine = _engine_with_classes({})["engine"]
    service = AsyncEngine(engine)
    with served_here(make_app(service, name="mine")) as (_, port):
        until(lambda: service.ready)
        yield {"engine": engine}, {"127.0.0.1:8000": f"127.0.0.1:{port}"}


def _check_http(names: Names) -> None:
    names["client"].close()
    assert len(names["made"].data) == 2
    assert names["varied"].data[0].b64_json
    assert size_of("sneaker.png") == (28, 28)
    assert Path("images.npz").stat().st_size > 8 * 28 * 28


def _models() -> AbstractContextManager[tuple[Names, Changes]]:
    _stable_diffusion("stable-diffusion-v1-5", {})
    for name in ("style", "detail"):
        down, up = torch.ones(1, 16), torch.ones(16, 1)
        save_file({f"unet.{STYLED}.lora_A.weight": down, f"unet.{STYLED}.lora_B.weight": up}, f"{name}.safetensors")
    return nullcontext(({}, {}))


def _check_models(names: Names) -> None:
    assert names["images"].shape == (2, 3, 16, 16)
    assert names["pixels"].shape == (2, 16, 16, 3)
    plain, styled = (names[engine].network.state_dict()[f"{STYLED}.weight"] for engine in ("engine", "styled"))
    torch.testing.assert_close(styled.float(), plain.float() + 1.0, rtol=0, atol=1e-6)


def _training() -> AbstractContextManager[tuple[Names, Changes]]:
    network = tiny_unet(classes=None)
    size = network.sample_size
    batches = list(torch.rand(2, 3, network.in_channels, size, size) * 2 - 1)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    return nullcontext(({"network": network, "batches": batches, "before": before}, {}))


def _check_training(names: Names) -> None:
    assert names["loss"].shape == (3,)
    pairs = zip(names["before"], names["network"].parameters(), strict=True)
    assert not any(torch.equal(before, after) for before, after in pairs)


def _migrating() -> AbstractContextManager[tuple[Names, Changes]]:
    import diffusers

    from stepfusion_testing.latent_models import randomised
    from stepfusion_testing.stable_diffusion import autoencoder, scheduler

    _stable_diffusion("stable-diffusion-v1-5", {})
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    # not as eps, of which random weights would make x0 = 160 x at first, and as much of every rounding
    clipping = diffusers.DDIMScheduler(prediction_type="v_prediction")
    diffusers.DDIMPipeline(randomised(unet, 0.05), clipping).save_pretrained("pixels")
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )
    diffusers.DiTPipeline(randomised(transformer), autoencoder(), scheduler()).save_pretrained("dit")
    ideal = stand_in(sf.NoiseSchedule.linear(), "epsilon")

    def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        (t,) = timesteps.unique()
        return ideal(x, int(t))

    return nullcontext(({"network": network}, {}))


NO_STAGE = Stage(_changed({}))
STAGES = {
    "README.md": Stage(
        _readme,
        {
            "diffusion = sf": _literature,
            "edm = sf": _other_paths,
            "async with": _engine_with_classes,
            "stepfusion sample path/to/stable-diffusion": partial(_stable_diffusion, "path/to/stable-diffusion"),
            'engine = sf.Engine.from_pretrained("stable': partial(_stable_diffusion, "stable-diffusion-v1-5"),
        },
        _check_readme,
    ),
    "docs/edm.md": Stage(_edm, {"network = sf.networks.UNet1D": _policy}),
    "docs/export.md": Stage(_changed({}), {"from stepfusion.export import": _inputs_of_the_bundle}, _check_export),
    "docs/http.md": Stage(_http, check=_check_http),
    "docs/metadata.md": Stage(_changed({"7-12.png": "7-2.png"})),
    "docs/migrating.md": Stage(_migrating),
    "docs/models.md": Stage(_models, check=_check_models),
    "docs/training.md": Stage(_training, check=_check_training),
}
