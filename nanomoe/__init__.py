"""Sparse Mixture-of-Experts language models in JAX."""

import trainers  # noqa: F401 (Before CLU: without it, that wants TensorFlow.)

__version__ = '0.1.0'
