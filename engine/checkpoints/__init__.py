"""Reading and writing models: directories of diffusers, files of guided-diffusion, and the bundled models."""
