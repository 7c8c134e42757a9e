"""ADM (Dhariwal & Nichol 2021) as EDM has it (Karras et al. 2022, appendix F.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from stepfusion.networks.blocks import sinusoid
from stepfusion.networks.edm.block import Block, group_norm
from stepfusion.networks.edm.config import DhariwalUNetConfig
from stepfusion.networks.edm.unet import EDMUNet
from stepfusion.networks.inputs import check_timesteps


class DhariwalUNet(EDMUNet[DhariwalUNetConfig]):
    """EDM's ADM, with the names that its state dicts have.

    Args:
        config: what to build.

    Raises:
        TypeError: the config is something else.
    """

    def __init__(self, config: DhariwalUNetConfig) -> None:
        if not isinstance(config, DhariwalUNetConfig):
            raise TypeError(f"config must be a DhariwalUNetConfig, got {type(config).__name__}")
        super().__init__(config)
        noise, width = config.noise_channels, config.emb_channels
        self.map_augment = nn.Linear(config.augment_dim, noise, bias=False) if config.augment_dim else None
        self.map_layer0 = nn.Linear(noise, width)
        self.map_layer1 = nn.Linear(width, width)
        self.map_label = nn.Linear(config.label_dim, width, bias=False) if config.label_dim else None
        for levels, blocks in ((self.down_plans, self.enc), (self.up_plans, self.dec)):
            for _, plans in levels:
                for plan in plans:
                    blocks[plan.name] = Block(config, plan)
        self.out_norm = group_norm(config.channels[0], config.norm_eps, nn.SiLU())
        self.out_conv = nn.Conv2d(config.channels[0], config.out_channels, kernel_size=3, padding=1)
        self.register_blocks()

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed c_noise [B] by a sinusoid and two layers: [B, emb_channels] in the weights' dtype."""
        check_timesteps(timesteps)
        waves = sinusoid(timesteps, self.config.noise_channels, freq_shift=0, flip_sin_to_cos=True)
        embedding: Tensor = self.map_layer1(functional.silu(self.map_layer0(waves.to(self.dtype))))
        return embedding

    def mapped(self, time: Tensor, classes: Tensor | None) -> Tensor:
        """With a row for the class."""
        if classes is not None and self.map_label is not None:
            time = time + self.map_label(classes)
        return functional.silu(time)

    def emitted(self, level: int, h: Tensor, out: Tensor | None) -> Tensor | None:
        """What the largest level says."""
        if level:
            return None
        result: Tensor = self.out_conv(self.out_norm(h))
        return result
