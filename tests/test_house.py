"""The house: a floor that one reads, four wings that may stay closed, and no arrow that goes in a circle.

The arrows are drawn from the source, imports inside functions counted.
"""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("kernels", "hub", "run", "look")
# Arrows from the floor up into a wing, which a reader of the floor meets. A new one needs a reason.
UP = {
    "answers": {"run.formulas"},  # math-verify, in a process of its own
    "data": {"hub.formats", "run.dist"},  # files of demonstrations; who computes which rows
    # a GPU's decode loop, weights cast once, bf16 widened; many processes; a sign of life
    "generate": {"kernels.bf16", "kernels.slots", "kernels.torch_backend", "run.dist", "run.pulse"},
    "model": {"kernels", "kernels.torch_backend"},  # log-probs without logits, attention of one token
    "pairs": {"hub.files", "run.dist"},  # files of preferences; who writes them
    "rewards": {"run.defaults", "run.device"},  # lengths that the data gives; --save_memory
    "rollout": {"run.device"},  # --save_memory
}


def modules():
    """{dotted name within nanorlhf: syntax tree}; a package goes by its folder's name, the top one by ""."""
    found = {}
    for path in sorted(ROOT.glob("nanorlhf/**/*.py")):
        parts = path.relative_to(ROOT / "nanorlhf").with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").removesuffix(".")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def arrows():
    """{module: modules of ours that it imports}."""
    trees = modules()
    out = {}
    for name, tree in trees.items():
        out[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                ours = [alias.name for alias in node.names if alias.name.startswith("nanorlhf")]
                assert not ours, f"{name}: write `from nanorlhf import ...`, so that this test sees the arrow"
            if not isinstance(node, ast.ImportFrom):
                continue
            assert node.level == 0, f"{name}: relative imports hide an arrow"
            base, _, inner = node.module.partition(".")
            if base != "nanorlhf":
                continue
            for alias in node.names:
                longer = f"{inner}.{alias.name}".strip(".")
                out[name].add(longer if longer in trees else inner)
    return out


def wing(name):
    return name.partition(".")[0] if name.partition(".")[0] in WINGS else "floor"


def circles(graph):
    """Every circle that a walk from some module comes upon."""
    found = []

    def walk(name, path):
        for target in sorted(graph.get(name, ())):
            if target in path:
                found.append([*path[path.index(target) :], target])
            elif target not in done:
                done.add(target)
                walk(target, [*path, target])

    done = set()
    for name in graph:
        if name not in done:
            done.add(name)
            walk(name, [name])
    return found


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_circle():
    assert circles(arrows()) == []


def test_arrows_from_the_floor_into_wings_are_those_listed():
    found = {}
    for name, targets in arrows().items():
        up = {target for target in targets if wing(target) != "floor"}
        if wing(name) == "floor" and up:
            found[name] = up
    assert found == UP


def test_errors_is_the_ground():
    assert arrows()["errors"] == set()


def test_no_trainer_is_imported_by_the_package():
    for name, tree in modules().items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not any(module.startswith("train_") for module in names), name


@pytest.mark.parametrize("folder", ["", *WINGS])
def test_every_folder_says_what_is_in_it(folder):
    """Three lines or so: what is in it, who may leave it closed, who opens it."""
    docstring = importlib.import_module(f"nanorlhf.{folder}".strip(".")).__doc__
    assert docstring and 2 <= len(docstring.strip().split("\n")) <= 8


def test_pyproject_lists_every_package():
    folders = [path.parent.relative_to(ROOT) for path in ROOT.glob("nanorlhf/**/__init__.py")]
    packages = {str(folder).replace("/", ".") for folder in folders}
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    assert packages <= set(re.findall(r'"([\w.]+)"', listed))
    trainers = {path.stem for path in ROOT.glob("train_*.py")}
    listed = re.search(r"py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    assert trainers <= set(re.findall(r'"(\w+)"', listed))


def common_blocks(path):
    """The blocks of a trainer between `# ---- the same in ...` and `# ---- end`."""
    source = path.read_text(encoding="utf-8")
    return re.findall(r"# ---- the same in train_ppo\.py and train_grpo\.py\n(.*?)# ---- end", source, re.S)


def test_ppo_and_grpo_read_alike():
    """Their outer loops are repeated on purpose; what is fenced as common is the same text in both."""
    ppo = common_blocks(ROOT / "train_ppo.py")
    grpo = common_blocks(ROOT / "train_grpo.py")
    assert ppo == grpo and len(ppo) >= 3 and sum(block.count("\n") for block in ppo) >= 20


EXAMPLES = ["data", "exact", "answers", "metrics", "pairs", "rollout"]
EXAMPLES += ["run.replay", "run.log", "run.reward_functions"]
TRAINERS = ["train_sft", "train_rm", "train_ppo", "train_grpo", "train_dpo", "train_distill"]


@pytest.mark.parametrize("name", [f"nanorlhf.{name}" for name in EXAMPLES] + TRAINERS)
def test_worked_examples_in_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


@pytest.mark.parametrize("name, function", [
    ("train_ppo", "gae"), ("train_ppo", "shape_rewards"), ("train_grpo", "advantages"),
    ("train_grpo", "token_weights"), ("nanorlhf.data", "pad"), ("nanorlhf.data", "response_mask"),
    ("nanorlhf.rollout", "Rollout"),
])  # fmt: skip
def test_who_has_a_shape_for_a_contract_has_an_example(name, function):
    assert ">>>" in getattr(importlib.import_module(name), function).__doc__
