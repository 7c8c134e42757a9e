"""The residual and attention UNet of the annotated implementations of DDPM."""
