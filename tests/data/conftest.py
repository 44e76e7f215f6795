"""Which file of tests here runs in a process of its own."""

# TensorFlow and torch's Triton crash in one process: name the file to run it, as test.sh does.
collect_ignore = ["test_seqio_bridge.py"]
