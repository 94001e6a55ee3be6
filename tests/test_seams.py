"""Who may import whom, read from the sources; and what `import steering` may load."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import steering

ROOT = Path(__file__).parent.parent
PACKAGES = ("steering", "rewards", "finetune", "tilt")
CORE = {
    f"steering.{name}"
    for name in (
        "weights", "resampling", "potentials", "settings", "arguments", "filter", "transitions",
        "guidance", "lineage",
    )
}  # fmt: skip
PURE_FINETUNE = {
    f"finetune.{name}" for name in ("losses", "policy_losses", "tensor_checks", "groups")
}
# What finetune may know of rewards: how to load one and what one is, no particular one.
REWARD_SEAM = {"rewards", "rewards.Reward", "rewards.load", "rewards.available"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(module: str, source: str, is_package: bool = False) -> set[str]:
    """Every name that the source imports, anywhere in it, absolute and dotted."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(module: str, name: str) -> bool:
    """Whether DESIGN's table keeps `module` from importing `name`."""
    if within(name, "scripts"):
        return True
    if within(module, "tilt"):
        return False
    if within(name, "tilt"):
        return True
    if within(module, "rewards"):
        return within(name, "steering", "finetune", "diffusers")
    if module in CORE:
        if within(name, "steering"):
            return not within(name, *CORE)
        return not within(name, "torch") and name.split(".")[0] not in sys.stdlib_module_names
    if within(module, "steering"):
        return within(name, "rewards", "finetune")
    if module in PURE_FINETUNE:
        return within(name, "diffusers", "steering", "rewards")
    return within(name, "rewards") and name not in REWARD_SEAM


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_follow_the_table(path: Path) -> None:
    module = module_of(path)
    names = imported(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert [name for name in sorted(names) if forbidden(module, name)] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and those for type checkers count, too."""
    paths = {module_of(path): path for path in sources()}
    graph = {}
    for module, path in paths.items():
        names = imported(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        found = {next((m for m in (n, n.rpartition(".")[0]) if m in paths), "") for n in names}
        graph[module] = found - {"", module}
    order = TopologicalSorter(graph).static_order()  # raises CycleError, which names the circle
    assert len(list(order)) == len(paths)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("steering.filter", "import diffusers"),
        ("steering.filter", "from steering.schedulers import stochastic"),
        ("steering.filter", "from . import pipeline"),
        ("steering.weights", "def f():\n    import numpy"),
        ("steering.pipeline", "import rewards"),
        ("steering.schedulers", "from finetune.policy_losses import policy_loss"),
        ("rewards.models.clip", "from diffusers.utils import logging"),
        ("rewards.models.clip", "import steering.weights"),
        ("finetune.losses", "from steering.weights import ess"),
        ("finetune.gdro", "from rewards.models.clip import ClipReward"),
        ("finetune.gdro", "from rewards.compare import hacked"),
        ("finetune.gdro", "import tilt.commands.steer"),
        ("tilt.loading", "from scripts import started"),
        ("steering.result", "from tilt.report import steered"),
        ("finetune.gdro", "import tilt"),
        ("rewards.models.clip", "from tilt import loading"),
    ],
)
def test_the_table_notices(module: str, line: str) -> None:
    assert any(forbidden(module, name) for name in imported(module, line))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("steering.filter", "import math\nfrom torch import Tensor"),
        ("steering.filter", "from steering import potentials"),
        ("steering.filter", "from .weights import ess"),
        ("steering.pipeline", "import diffusers\nfrom steering.filter import weigh"),
        ("rewards.models.clip", "import open_clip\nfrom rewards.images import resize"),
        ("finetune.gdro", "from steering import steer\nfrom rewards import Reward, load"),
        ("tilt.loading", "import diffusers, rewards.models.clip\nfrom finetune.gdro import Gdro"),
    ],
)
def test_the_table_permits(module: str, line: str) -> None:
    assert not any(forbidden(module, name) for name in imported(module, line))


def test_importing_steering_loads_neither_diffusers_nor_cuda() -> None:
    program = (
        "import sys, torch\n"
        "import steering\n"
        "steering.FeynmanKac()\n"
        "heavy = {'diffusers', 'transformers', 'rewards', 'finetune'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in steering.__all__:
        assert getattr(steering, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'steeer'"):
        _ = steering.steeer  # type: ignore[attr-defined]
