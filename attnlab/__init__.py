"""attnlab: a laboratory for long-sequence attention in JAX."""

__version__ = "0.1.0"
