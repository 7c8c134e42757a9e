"""The UNet of DDPM, with the configs and state-dict keys of diffusers' ``UNet2DModel``."""
