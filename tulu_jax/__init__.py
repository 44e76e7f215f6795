"""TÜLU 2 post-training for Llama-2 and Code Llama in JAX."""

import os

# `gs://` goes through gcsfs whether or not TensorFlow (of the seqio bridge) is installed, which
# etils would prefer. Setting the variable before decides otherwise.
os.environ.setdefault("EPATH_USE_TF", "false")
