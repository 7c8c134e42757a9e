"""Networks that predict eps, x0 or v from a noisy image and a timestep."""

from stepfusion.networks.adm_config import ADMUNetConfig
from stepfusion.networks.adm_unet import ADMUNet
from stepfusion.networks.annotated_unet import AnnotatedUNet
from stepfusion.networks.config import UNet2DConfig
from stepfusion.networks.context_unet import ContextUNet
from stepfusion.networks.prepare import prepare_network
from stepfusion.networks.unet2d import UNet2D

__all__ = ["ADMUNet", "ADMUNetConfig", "AnnotatedUNet", "ContextUNet", "UNet2D", "UNet2DConfig", "prepare_network"]
