"""The UNet of guided-diffusion (ADM), with the keys of its published checkpoints."""
