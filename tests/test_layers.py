"""The import layers of the design, and one home for each library, read from the source."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "tulu_jax"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# What each folder may import of tulu_jax; files at the top may import everything below them.
ANYONE = {
    "validation",
    "strict_json",
    "digests",
    "chips",
    "process_identity",
    "atomic",
    "bucket_client",
}
ALLOWED = {
    "kernels": {"quant"},
    "quant": set(),
    "parallel": set(),
    "data": set(),
    "models": {"kernels", "quant", "parallel"},
    "objectives": {"models", "data", "training", "decode", "parallel"},
    "training": {"models", "parallel"},
    "interop": {"models", "parallel", "quant"},
    "decode": {"models", "parallel"},
    "audit": {"data", "interop"},
    "serving": {"data", "decode"},
}
TOP = {
    "adapted",
    "base",
    "recipe",
    "step",
    "meter",
    "provenance",
    "trainer",
    "trained",
    "conversion",
    "model_card",
    "verification",
    "preflight",
    "cli",
    "gin_files",
    "gin_text",
}
ENTRY_POINTS = {
    "checkpoints",
    "train",
    "prepare",
    "convert",
    "generate",
    "serve",
    "evaluate",
    "report",
    "rehearse",
    "dryrun",
    "compare",
    "study",
}
HOMES = {
    "gin": {"gin_files.py"},
    "flax": {"models/"},
    "orbax": {"training/checkpoint.py"},
    "gcsfs": {"bucket_client.py"},
    "aiohttp": {"bucket_client.py"},
    "tensorstore": {"training/checkpoint_arrays.py"},
    "safetensors": {"interop/"},
    "torch": {"interop/"},
    "seqio": {"data/seqio_bridge.py"},
    "tensorflow": {"data/seqio_bridge.py"},
    "grain": {"data/loader.py"},
    "tensorboardX": {"training/metrics.py"},
    "wandb": {"training/metrics.py"},
    "datasets": {"data/"},
    "tokenizers": {"data/"},
    "starlette": {"serving/app.py"},
    "uvicorn": {"serve.py"},
    "openai": {"serving/openai_engine.py"},
    "lm_eval": {"evals/harness.py"},
    "jinja2": {"audit/show_html.py", "report.py", "studies/study_page.py"},
}


def imports(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path: pathlib.Path):
    """The parts of tulu_jax that a module imports: folder or top-level module names."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "tulu_jax" and len(parts) > 1:
            yield parts[1]


@pytest.mark.parametrize("module", MODULES)
def test_layers(module):
    folder = module.split("/")[0] if "/" in module else None
    found = set(own(PACKAGE / module)) - ANYONE
    if folder is None:
        name = module.removesuffix(".py")
        if name in ANYONE:
            assert not found
        elif name not in ENTRY_POINTS:
            assert name in TOP | {"__init__"}, f"{module} has no layer; add it to this test"
            assert not found & ENTRY_POINTS, f"{module} imports an entry point"
        return
    if folder in ("evals", "planning", "studies"):
        assert not found & ENTRY_POINTS
        return
    allowed = ALLOWED[folder] | {folder}
    assert found <= allowed, f"{module} may import {allowed}, not {found - allowed}"


@pytest.mark.parametrize("module", MODULES)
def test_one_home_for_each_library(module):
    for name in imports(PACKAGE / module):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or any(module.startswith(home) for home in homes), (
            f"{module} imports {name}, which belongs in {sorted(homes)}"
        )


def test_every_name_is_one_file():
    names = [module.split("/")[-1] for module in MODULES if not module.endswith("__init__.py")]
    assert sorted(names) == sorted(set(names))


def test_only_kernels_import_pallas():
    for module in MODULES:
        names = list(imports(PACKAGE / module))
        if any("pallas" in name for name in names):
            assert module.startswith("kernels/"), module


def test_shapes_are_checked_wherever_they_are_written(pytestconfig):
    """`pyproject.toml` lists what is checked as tests run; a shape elsewhere would be a comment."""
    checked = pytestconfig.getoption("jaxtyping_packages").split(",")[:-1]
    for module in MODULES:
        if any(name.split(".")[0] == "jaxtyping" for name in imports(PACKAGE / module)):
            dotted = f"tulu_jax.{module.removesuffix('.py').replace('/', '.')}"
            assert any(f"{dotted}.".startswith(f"{name}.") for name in checked), module
