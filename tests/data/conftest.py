"""A small tokenizer, and tasks that exist for one test."""

import pytest
from raw_rows import identity

from tulu_jax.data import chat, registry, tulu_tiny

# TensorFlow and torch's Triton crash in one process: name the file to run it, as test.sh does.
collect_ignore = ["test_seqio_bridge.py"]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> str:
    """A folder with the byte-level BPE tokenizer of tulu_tiny."""
    return tulu_tiny.tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> chat.ChatTokenizer:
    return chat.load_tokenizer(tokenizer_dir)


@pytest.fixture
def add_task():
    """`add_task(name, sources, ...)` registers a task until the test ends."""
    added = []

    def add(name: str, sources: dict, **options) -> registry.Task:
        options = {"kind": "sft", "convert": identity, "licence": "-", "origin": "-"} | options
        task = registry.Task(name=name, sources=sources, **options)
        registry.TaskRegistry.add(task)
        added.append(name)
        return task

    yield add
    for name in added:
        registry.TaskRegistry.remove(name)
