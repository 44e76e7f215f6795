"""TÜLU 2 post-training for Llama-2 and Code Llama in JAX."""

import os

import fsspec

# What `gs://` goes through; a variable that is set before decides otherwise. gcsfs, and not
# TensorFlow (of the seqio bridge), which etils would prefer; the JSON interface, which every bucket
# has; for the arrays of checkpoints TensorStore, which by itself waits for ever.
_SETTINGS = {
    "EPATH_USE_TF": "false",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",  # a second, over the next
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

for _protocol in ("gcs", "gs"):
    fsspec.register_implementation(
        _protocol,
        "tulu_jax.bucket_client.Client",
        clobber=True,
        errtxt='gs:// paths need the extra "gcs": pip install "tulu_jax[gcs]"',
    )
