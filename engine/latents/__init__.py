"""What stands around a denoiser of latents: autoencoders, text encoders, LoRA weights, files of them all."""

from stepfusion.latents.autoencoder import LatentDecoder, LatentEncoder, autoencoder_from
from stepfusion.latents.autoencoder_config import LatentSpace
from stepfusion.latents.lora import merge_lora
from stepfusion.latents.prompts import PromptConditions
from stepfusion.latents.tensor_file import TensorFile, read_tensors
from stepfusion.latents.text import TextEncoder, TextPart
from stepfusion.latents.time_ids import refiner_ids, size_ids

__all__ = [
    "LatentDecoder",
    "LatentEncoder",
    "LatentSpace",
    "PromptConditions",
    "TensorFile",
    "TextEncoder",
    "TextPart",
    "autoencoder_from",
    "merge_lora",
    "read_tensors",
    "refiner_ids",
    "size_ids",
]
