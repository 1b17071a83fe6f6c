"""One denoiser family per file; importing this package makes all of them known."""

from . import flux, sd3, unet

__all__ = ["flux", "sd3", "unet"]
