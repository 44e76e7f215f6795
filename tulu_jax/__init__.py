"""TÜLU 2 post-training for Llama-2 and Code Llama in JAX."""
