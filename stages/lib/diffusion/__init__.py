"""The mathematics of denoising diffusion: schedule, noise, target, loss, held-out loss, previews.

Imports encoding and the rooms below. Functions of tensors alone; a change counts as another training run, and
measures the base and the trained UNet anew.
"""
