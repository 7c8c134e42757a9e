"""The diffusion transformer of Peebles & Xie 2023, with the state-dict keys of diffusers."""
