"""The UNet of Stable Diffusion, with the configs and state-dict keys of diffusers' ``UNet2DConditionModel``."""
