"""FG-3DGS and TalkingGaussian in JAX: audio-driven 3-D talking heads by Gaussian splatting."""

__version__ = "0.1.0"
