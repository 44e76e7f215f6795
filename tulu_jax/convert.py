"""Converts a run's checkpoint to a Hugging Face folder, or Hugging Face weights to a checkpoint.

Examples:
  python -m tulu_jax.convert --gin_file=tulu_tiny_dpo.gin --out=runs/tulu_tiny_dpo/hf
  python -m tulu_jax.convert --gin_file=stories260k_sft.gin --step=40 --dtype=bfloat16 --out=hf
  python -m tulu_jax.convert --gin_file=stories260k_sft.gin --from_hf   # step 0 from its BASE
  python -m tulu_jax.convert --gin_file=runs/sft_70b/config.gin --out=hf --verify
  python -m tulu_jax.convert --gin_file=tulu_tiny_qlora.gin --merge=dequantised --check="Hello"

It takes one host without accelerators, whatever the size of the model: a layer of a parameter is in
memory at a time. BASE may also be a folder with pytorch_model.bin, one of Meta's, or a streamed
file of EasyLM. What was killed goes on when the same command is given again.
"""

from absl import flags, logging

from tulu_jax import cli, validation

_OUT = flags.DEFINE_string("out", None, "Hugging Face folder to write. Default: <workdir>/hf.")
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", lower_bound=0
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Dtype of the weights. Default: that of the base (for float16, bfloat16); of a run that began "
    "with random parameters, theirs.",
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the folder, if an export made it.")
_FROM_HF = flags.DEFINE_bool("from_hf", False, "Write the config's base as checkpoint of step 0.")
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Compare logits with those of transformers, layer by layer, when all is written. Needs torch.",
)
_MERGE = flags.DEFINE_enum(
    "merge",
    None,
    ["dequantised", "full"],
    "Of a run with an adapter: write one model, the adapter merged into the base it trained "
    "beside, dequantised (the paper's), or into the full-precision base. Default: the adapter, for "
    "PEFT.",
)
_CHECK = flags.DEFINE_multi_string(
    "check",
    [],
    "A prompt, and again: prints how far each way to merge is from the model that was trained.",
)
_OUTWARD = ("out", "step", "dtype", "overwrite")
flags.register_multi_flags_validator(
    ["from_hf", *_OUTWARD],
    lambda given: not given["from_hf"] or {given[name] for name in _OUTWARD} <= {None, False},
    message=f"--from_hf writes into the workdir; {', '.join(_OUTWARD)} are of the other direction",
)


def main(config) -> None:
    """Writes the folder, or the checkpoint of step 0 that `train` goes on from."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # a run may hold the chips
    from tulu_jax import preflight

    needs = preflight.to_start if _FROM_HF.value else preflight.to_read
    cli.stop_if(needs(config, num_devices=1))
    from tulu_jax import conversion

    if config.adapter is not None and _VERIFY.value and not _MERGE.value:
        raise validation.UsageError(
            "--verify: transformers reads no adapter by itself; expected --merge=dequantised or "
            "--merge=full, which write the whole model (--check compares both)"
        )
    if _FROM_HF.value:
        conversion.write_first_step(config, cli.operative_config())
        if _VERIFY.value:
            conversion.verify(config, config.base, step=0)
        return
    if config.adapter is None and (_MERGE.value or _CHECK.value):
        raise validation.UsageError(
            "--merge and --check are for runs with an adapter; this has none"
        )
    if _CHECK.value:
        from tulu_jax import adapted

        for line in adapted.check(config, _STEP.value, _CHECK.value):
            print(line)
    out = validation.expanded(_OUT.value or f"{config.workdir}/hf")
    conversion.export(
        config,
        out,
        step=_STEP.value,
        dtype=_DTYPE.value,
        overwrite=_OVERWRITE.value,
        merge=_MERGE.value,
    )
    logging.info("Wrote %s", out)
    if _VERIFY.value:
        conversion.verify(config, out, step=_STEP.value, merge=_MERGE.value)


if __name__ == "__main__":
    cli.run(main)
