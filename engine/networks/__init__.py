"""Networks that predict eps, x0 or v from a noisy image and a timestep."""

from stepfusion.networks.config import UNet2DConfig
from stepfusion.networks.unet2d import UNet2D

__all__ = ["UNet2D", "UNet2DConfig"]
