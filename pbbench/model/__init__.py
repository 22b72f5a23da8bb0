"""The patch U-Net and its diffusion: torch only, nothing of training, memory or sweeps.

An image's way through: ``diffusion.Diffusion.q_sample`` → ``unet.PatchUNet.forward`` (split → network → merge) →
``Diffusion.loss``. ``tests/test_walkthrough.py`` carries one image along it.
"""
