"""Imports run one way, and the command line stays light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import nanothink

PACKAGE = Path(nanothink.__file__).parent

EVERYWHERE = {"errors", "reporter", "suggestions", "wording"}
MAY_IMPORT: dict[str, set[str]] = {
    "disk": set(),
    "config": set(),
    "data": {"disk", "config"},
    "models": {"disk", "config", "data"},
    "vector_store": {"disk", "config", "data", "models"},
    "checkpoints": {"disk", "config", "data", "models"},
    "inference": {"config", "data", "models"},
    "training": {"disk", "config", "data", "models", "inference"},
    "report": {"config", "models", "training"},
    "runs": {
        *("disk", "config", "data", "models", "vector_store", "inference", "training", "checkpoints"),
        "report",
    },
    "serve": {"errors", "data", "models", "vector_store", "inference", "runs"},
    "cli": {
        *("disk", "config", "data", "models", "vector_store", "inference", "training", "checkpoints"),
        "runs",
        "serve",
    },
}


def _imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("nanothink.")}
    return parts


def _modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name not in {"__main__.py"} and p.parent != PACKAGE)


def test_every_part_has_a_place() -> None:
    parts = {p.relative_to(PACKAGE).parts[0] for p in _modules()}
    assert parts == set(MAY_IMPORT)


def test_imports_run_one_way() -> None:
    wrong = {}
    for path in _modules():
        name = path.relative_to(PACKAGE)
        if others := _imported_parts(path) - {name.parts[0]} - MAY_IMPORT[name.parts[0]] - EVERYWHERE:
            wrong[str(name)] = others
    assert wrong == {}


def test_no_import_circles() -> None:
    """Imports inside functions count too; those that only a type checker sees do not."""
    modules = {_name(path): path for path in PACKAGE.rglob("*.py")}
    arrows = {name: _imported_modules(path, set(modules)) for name, path in modules.items()}
    try:
        list(graphlib.TopologicalSorter(arrows).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a module imports, at whatever moment."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= whole or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_no_module_is_a_grab_bag() -> None:
    assert not [p for p in _modules() if p.stem in {"utils", "common", "helpers", "misc"}]


def test_only_render_knows_rich() -> None:
    knowing = {
        p.relative_to(PACKAGE).parts[:2]
        for p in _modules()
        for node in ast.walk(ast.parse(p.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich"
    }
    assert knowing == {("cli", "render")}


def test_the_core_never_prints() -> None:
    printing = [
        f"{p.relative_to(PACKAGE)}:{node.lineno}"
        for p in _modules()
        if p.relative_to(PACKAGE).parts[0] != "cli"
        for node in ast.walk(ast.parse(p.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, nanothink.cli.app as app; app.run(['--help']);"
        "heavy = {'torch', 'faiss', 'numpy', 'transformers', 'tokenizers', 'pydantic', 'rich'};"
        "heavy &= set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "mistake",
    ["pretrain transformer --preset tinny", "train-mla --set mla.x=1", "pretrain diffuser --domains x"],
)
def test_a_mistake_in_the_settings_is_said_before_torch_is_imported(mistake: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "tales").mkdir(parents=True)
    (tmp_path / "data" / "tales" / "a.jsonl").write_text('{"text": "Once"}\n', "utf-8")
    code = (
        f"import sys, nanothink.cli.app as app; code = app.run({mistake.split()});"
        "sys.exit(code if 'torch' not in sys.modules else 'imported torch')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "checkpoints").exists()


def test_neither_training_nor_generating_imports_what_it_does_not_use(
    tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Sympy takes half a second and torch's compiler over one; torch imports either at the least occasion."""
    small = ("model.d_model=16", "model.max_seq_len=16", "transformer.n_layers=1", "transformer.n_heads=2")
    data = ["--data-dir", str(tiny_corpus), "--tokenizer", str(tiny_tokenizer), "--max-steps", "1"]
    train = ["pretrain", "transformer", *data, *(part for setting in small for part in ("--set", setting))]
    commands = [train, ["generate", "The", "-n", "1"], ["eval", "--max-tokens", "50"]]
    code = (
        f"import sys; from nanothink.cli.app import run; codes = [run(c) for c in {commands!r}];"
        "import nanothink.runs.store_commands, nanothink.cli.store;"  # FAISS comes with the first use alone
        "unused = {'sympy', 'torch._dynamo', 'torch._inductor', 'triton', 'faiss'} & set(sys.modules);"
        "sys.exit(f'{codes} imported {unused}' if unused or any(codes) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert nanothink.__all__ == ["Config", "__version__", "load"]
    for name in nanothink.__all__:
        assert getattr(nanothink, name) is not None
