"""The direction of the imports, the table of contents, and what must not be loaded."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import get_origin

import pytest

import capsnet

ROOT = Path(capsnet.__file__).parent
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "reference"),
    ("files", "functional"),
    ("options",),
    ("routing",),
    ("kernels",),
    ("environment", "layers"),
    ("matrix_capsules",),
    ("models",),
    ("config",),
    ("devices", "objective"),
    ("data",),
    ("analysis", "memory"),
    ("evaluation",),
    ("checkpoints", "plots"),
    ("report", "training"),
    ("training.fit",),
    ("demo", "experiments", "prediction"),
    ("cli",),
    ("__main__",),
)
"""From the bottom up (DESIGN.md); a part is a file or a folder, and imports only parts of the levels below."""
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def modules() -> dict[str, Path]:
    """Every file of the package by its module's name; the table of contents itself is not among them."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items() if name != "__init__"}


MODULES = modules()


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of what a file imports, inside functions too unless told otherwise."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """Modules of the package that a file imports: `capsnet.data.Split` is in `data`, `capsnet.data.idx` a module."""
    found = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "capsnet":
            continue
        inside = ".".join(parts[1:])
        while inside and inside not in MODULES:
            inside = inside.rpartition(".")[0]
        if inside:  # else a name of the table of contents, such as __version__
            found.add(inside)
    return found


def part(module: str) -> str:
    return module if module in LEVEL else module.partition(".")[0]


def outside(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Packages other than ours and the standard library's that a file imports."""
    names = {part(name) for name in imported(path, top_level_only=top_level_only)}
    return names - set(sys.stdlib_module_names) - {"capsnet"}


def test_the_reader_of_imports_sees_them() -> None:
    assert {"functional", "errors"} <= ours(MODULES["routing"])
    assert "data.registry" in ours(MODULES["data"])
    assert "matplotlib" in outside(MODULES["plots.style"])
    assert "matplotlib" not in outside(MODULES["plots.style"], top_level_only=True)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upward(module: str) -> None:
    assert part(module) in LEVEL, f"give {module} its level in DESIGN.md and here"
    mine = part(module)
    upward = {o for o in ours(MODULES[module]) if part(o) != mine and LEVEL[part(o)] >= LEVEL[mine]}
    assert not upward, f"{module} imports {upward}"


def test_nothing_imports_in_a_circle() -> None:
    TopologicalSorter({name: ours(path) - {name} for name, path in MODULES.items()}).prepare()


def test_the_leaves_are_leaves() -> None:
    assert outside(MODULES["reference"]) == {"numpy"}
    assert not ours(MODULES["reference"])
    assert not {name for name, path in MODULES.items() if "reference" in ours(path)}
    assert not ours(MODULES["errors"]) | outside(MODULES["errors"])
    assert ours(MODULES["functional"]) == {"errors"}
    assert ours(MODULES["config"]) == {"errors", "files", "models.registry", "options", "options.schema"}
    assert outside(MODULES["config"]) == {"yaml"}
    assert not any(part(other) == "kernels" for other in ours(MODULES["routing"]))
    for name, path in MODULES.items():
        if part(name) == "data":
            assert {part(other) for other in ours(path)} <= {"data", "errors", "files", "options"}, name


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("matplotlib", {"plots.capsules", "plots.classes", "plots.style", "plots.results"}),
        ("lightning_fabric", {"devices", "training.fit", "training.loop", "training.state"}),
        ("pooch", {"data.download", "files"}),
        ("tqdm", {"data.download", "data.image_cache"}),
        ("tyro", {name for name in MODULES if part(name) == "cli"}),
        ("scipy", {"data.matlab", "evaluation.statistics"}),
        ("jinja2", {"report.report"}),
        ("onnx", {"checkpoints.export"}),
        ("onnxruntime", {"checkpoints.exported", "checkpoints.serving.predictor"}),
        ("starlette", {"cli.demo", "demo.app", "demo.guard"}),
        ("uvicorn", {"cli.demo", "demo.serving"}),
        (
            "PIL",
            {"checkpoints.serving.predictor", "data", "data.image_file", "data.in_memory", "data.photo", "plots.style"},
        ),
    ],
)
def test_a_heavy_package_has_one_home(package: str, homes: set[str]) -> None:
    assert {name for name, path in MODULES.items() if package in outside(path)} <= homes


def test_drawing_and_the_hub_are_imported_when_used_only() -> None:
    for name, path in MODULES.items():
        eager = outside(path, top_level_only=True) & {
            "matplotlib",
            "huggingface_hub",
            "tensorboard",
            "PIL",
            "jinja2",
            "pooch",
            "scipy",
            "tqdm",
        }
        assert not eager, name
    assert "torch" not in outside(MODULES["cli"], top_level_only=True)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


HEAVY = "{'torch', 'matplotlib', 'lightning_fabric', 'PIL', 'huggingface_hub', 'numpy', 'yaml', 'rich', 'pooch'}"


@pytest.mark.parametrize("module", ["capsnet", "capsnet.config", "capsnet.errors"])
def test_importing_is_cheap_and_silent(module: str) -> None:
    assert python(f"import sys, {module}; print(sorted({HEAVY} & set(sys.modules)))") == "[]"


def test_the_command_line_is_imported_without_torch() -> None:
    heavy = "{'torch', 'matplotlib', 'lightning_fabric', 'PIL', 'huggingface_hub'}"
    assert python(f"import sys, capsnet.cli; print(sorted({heavy} & set(sys.modules)))") == "[]"


# the table of contents


STUB = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
PUBLIC = {
    alias.name: node.module
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.name == alias.asname and node.level == 1
}
"""Each public name and the module that it comes from, None for a module, as type checkers see them."""


def test_the_table_of_contents_holds_what_exists() -> None:
    aliases = [alias for node in STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(aliases) == len(PUBLIC) == len(capsnet.__all__)
    assert set(PUBLIC) == set(capsnet.__all__) <= set(dir(capsnet))
    assert {"CapsNet", "Config", "Network", "Output", "Result", "create", "fit", "squash", "votes"} <= set(PUBLIC)
    for name, home in PUBLIC.items():
        module = import_module(f"capsnet.{home or name}")
        assert getattr(capsnet, name) is (getattr(module, name) if home else module)
        assert home is None or name in module.__all__


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="capsnet attribute squish"):
        capsnet.squish  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__main__"])
def test_public_names_exist_and_say_what_they_are(module: str) -> None:
    found = import_module(f"capsnet.{module}")
    assert found.__doc__, f"{module} says what it holds"
    own = {
        name
        for name, thing in vars(found).items()
        if not name.startswith("_") and callable(thing) and getattr(thing, "__module__", None) == found.__name__
    }
    public = getattr(found, "__all__", [])
    assert public or not own, f"{module} needs __all__"
    assert len(public) == len(set(public))
    for name in public:
        thing = getattr(found, name)
        if callable(thing) and get_origin(thing) is None:
            assert (thing.__doc__ or "").strip(), f"{module}.{name}"
            assert not (thing.__doc__ or "").startswith(f"{name}("), f"{module}.{name}: only what dataclass wrote"


def test_sub_modules_are_there_without_being_imported_by_hand() -> None:
    code = "import capsnet; capsnet.data.load; capsnet.models.create; capsnet.evaluation.evaluate; print('ok')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "ok\n"
