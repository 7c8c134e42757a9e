"""What stands around a denoiser of latents: autoencoders, text encoders, LoRA weights, files of them all."""
