"""Networks that predict eps, x0 or v from a noisy image and a timestep, or F from an image and a noise level."""

from stepfusion.networks.adm.config import ADMUNetConfig
from stepfusion.networks.adm.unet import ADMUNet
from stepfusion.networks.annotated.unet import AnnotatedUNet
from stepfusion.networks.conditioned import ConditionedNetwork, ConditionSpec
from stepfusion.networks.context.unet import ContextUNet
from stepfusion.networks.dit.config import DiTConfig
from stepfusion.networks.dit.network import DiT
from stepfusion.networks.edm.config import DhariwalUNetConfig, SongUNetConfig
from stepfusion.networks.edm.dhariwal import DhariwalUNet
from stepfusion.networks.edm.song import SongUNet
from stepfusion.networks.prepare import prepare_network
from stepfusion.networks.unet1d.unet import UNet1D
from stepfusion.networks.unet2d.config import UNet2DConfig
from stepfusion.networks.unet2d.unet import UNet2D
from stepfusion.networks.unet2d_condition.config import UNet2DConditionConfig
from stepfusion.networks.unet2d_condition.unet import UNet2DCondition

__all__ = [
    "ADMUNet",
    "ADMUNetConfig",
    "AnnotatedUNet",
    "ConditionSpec",
    "ConditionedNetwork",
    "ContextUNet",
    "DhariwalUNet",
    "DhariwalUNetConfig",
    "DiT",
    "DiTConfig",
    "SongUNet",
    "SongUNetConfig",
    "UNet1D",
    "UNet2D",
    "UNet2DCondition",
    "UNet2DConditionConfig",
    "UNet2DConfig",
    "prepare_network",
]
