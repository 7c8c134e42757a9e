"""Small networks for tests: fast, deterministic, and with answers of the size that real ones give."""

import torch

import stepfusion as sf


def smooth(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """A bounded function of every pixel and of the timestep, without labels."""
    return torch.tanh(0.9 * x + 1e-3 * timesteps.view(-1, 1, 1, 1))


def labelled(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Like :func:`smooth`, moved by the label."""
    return smooth(x, timesteps) + 0.1 * labels.view(-1, 1, 1, 1)


def tiny_unet(seed: int = 0, *, classes: int | None = 4, channels: int = 1, size: int = 8) -> sf.networks.UNet2D:
    """A UNet of some ten thousand random weights, with attention."""
    torch.manual_seed(seed)
    config = sf.networks.UNet2DConfig(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    )
    return sf.networks.UNet2D(config).eval()
