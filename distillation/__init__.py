"""Latent consistency distillation of a LoRA: pure torch, on any denoiser in ComfyUI's sigma space."""
