"""Serves what a run trained, on this host, as OpenAI's clients expect it: completions and chats.

Examples:
  python -m tulu_jax.serve --gin_file=tulu_tiny_dpo.gin
  python -m tulu_jax.serve --gin_file=dpo_7b.gin --slots=32 --max_length=4096 --port=8080
"""

import importlib.util
import socket

from absl import flags

from tulu_jax import cli, validation

_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen at. Whoever reaches it may use the model: no key is "
    "asked for.",
)  # fmt: skip
_PORT = flags.DEFINE_integer(
    "port", 8000, "Port to listen at; 0 takes a free one.", lower_bound=0, upper_bound=65535
)
_NAME = flags.DEFINE_string(
    "model_name", None, "The model's name in requests. Default: the gin file's name."
)
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", lower_bound=0
)
_INITIAL = flags.DEFINE_bool("initial", False, "Serve the parameters that training starts from.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Continuations that are decoded at once.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
    "steps_per_visit", 8, "Tokens of each between two looks at what is asked and what is given up.",
    lower_bound=1,
)  # fmt: skip
_CACHE_POSITIONS = flags.DEFINE_integer(
    "cache_positions", None, "Positions of the cache. Default: --slots times --max_length.",
    lower_bound=1,
)  # fmt: skip
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Most positions of a prompt with its continuation. Default: the model's.",
    lower_bound=2,
)  # fmt: skip
_MOST_WAITING = flags.DEFINE_integer(
    "most_waiting", 1024, "Requests that may wait for a slot; more are told to come later.",
    lower_bound=1,
)  # fmt: skip
flags.register_multi_flags_validator(
    ["initial", "step"],
    lambda given: not given["initial"] or given["step"] is None,
    message="--initial is before any step; give one of --initial and --step",
)
KEPT = 75  # seconds of an idle connection: longer than clients keep one, who would find it closed
STOPPING = 3  # seconds that answers under way get when the server is asked to stop


def main(config) -> None:
    """Loads the model, and answers until it is told to stop."""
    absent = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if absent:
        raise validation.UsageError(
            f'serving needs {" and ".join(absent)}; pip install "tulu_jax[serve]"'
        )
    with validation.reading():
        listener = _bound(_HOST.value, _PORT.value)
    from tulu_jax import preflight

    cli.check(config, preflight.to_read)
    import jax
    import uvicorn

    from tulu_jax import trained
    from tulu_jax.decode import batcher as batcher_lib
    from tulu_jax.decode import decoder as decoder_lib
    from tulu_jax.serving import api_requests, app

    if jax.process_count() > 1:
        raise validation.UsageError("one process serves; start one alone, on one host")
    longest = config.model.max_positions
    if _MAX_LENGTH.value is not None and _MAX_LENGTH.value > longest:
        raise validation.UsageError(
            f"--max_length={_MAX_LENGTH.value}: the model has {longest:,} positions; expected no "
            "more"
        )
    model = trained.Generator(config, step=_STEP.value, initial=_INITIAL.value, max_new_tokens=1)
    decoder = decoder_lib.Decoder(
        config.model,
        config.execution,
        slots=_SLOTS.value,
        steps=_STEPS.value,
        cache_positions=_CACHE_POSITIONS.value,
        max_length=_MAX_LENGTH.value,
    )
    served = api_requests.Served(
        name=_NAME.value or cli.gin_file().rpartition("/")[2].removesuffix(".gin"),
        tokenizer=model.tokenizer,
        chat=config.data.chat,
        max_length=decoder.max_length,
    )
    batcher = batcher_lib.Batcher(
        decoder,
        model.params,
        mesh=model.mesh,
        detokenize=model.tokenizer.decode,
        most_waiting=_MOST_WAITING.value,
        failed=lambda: setattr(server, "should_exit", True),
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app.make(batcher, served),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEPT,
            timeout_graceful_shutdown=STOPPING,
        )
    )
    batcher.start()
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"Serving {served.name} at http://{shown}:{port}/v1; Ctrl-C stops", flush=True)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print("Stopped")
    finally:
        batcher.close()
    if batcher.error is not None:
        raise batcher.error


def _bound(host: str, port: int) -> socket.socket:
    """A socket at that address; taken now, before the model is loaded. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(
            f"--host={host} --port={port}: {error.strerror or error}; expected an address of this "
            "host and a port that is free, or --port=0 for any"
        ) from error
    return found


if __name__ == "__main__":
    cli.run(main)
