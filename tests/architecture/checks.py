"""Rules of the code base as functions of one file's text; each returns the problems that it finds.

A path is the file's place in the repository, with slashes. The files are read by test_rules.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_RECIPE_LINES = 150
MAX_FIT_LINES = 200

# What each package may import of ours. Recipes are started as processes, never imported.
ARROWS = {
    "omni_train": ("omni_train",),
    "recipes": ("omni_train",),
    "data_pipelines": (
        "data_pipelines",
        "omni_train.data",
        "omni_train.speech",
        "omni_train.config",
    ),
    "launch": ("launch", "omni_train", "data_pipelines"),
    "benchmarks": ("benchmarks", "omni_train", "data_pipelines"),
}
OURS = (*ARROWS, "tests")
# Each of these belongs to one wrapping module.
OPTIONAL = (
    "espeakng_loader",
    "funasr",
    "gcsfs",
    "peft",
    "pocketsphinx",
    "s3fs",
    "sacrebleu",
    "tensorboard",
    "wandb",
)
PICKLES = ("cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve")
# Rank variables, and what a launcher hands on; no setting is read from anywhere but the config.
ENVIRONMENT = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_VISIBLE_DEVICES", "PATH", "PYTHONPATH", "TORCHELASTIC_RUN_ID"),
}
_LAUNCHER = re.compile(
    r"deepspeed\.launcher|-m deepspeed\b|[\[(]\s*[\"']deepspeed[\"']\s*,|"
    r"\bdeepspeed +(--\w|\S+\.py)"
)
_ABSOLUTE = re.compile(r"(?<![\w./$}*-])/(work|root|home|tmp|mnt|opt|Users|scratch|shared)/")


def long_file(path: str, text: str) -> list[str]:
    """Limit of lines by kind of file."""
    limit = MAX_FILE_LINES
    if path.startswith("recipes/"):
        limit = MAX_RECIPE_LINES
    if path == "omni_train/engine/fit.py":
        limit = MAX_FIT_LINES
    lines = len(text.splitlines())
    return [f"{path}: {lines} lines, at most {limit}"] if lines > limit else []


def long_functions(path: str, text: str) -> list[str]:
    """Limit of lines per function, decorators and docstring included."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            # A long table of parametrised cases is data, not code.
            if path.startswith("tests/"):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{path}:{first} {node.name}: {lines} lines")
    return found


def imports(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, those inside functions included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def wrong_arrows(path: str, text: str) -> list[str]:
    """Imports against the layering, relative ones, and by string, which hides the layering."""
    package = path.split("/")[0]
    if package not in ARROWS:
        return []
    found = []
    for line, name in imports(text):
        if name.startswith("."):
            found.append(f"{path}:{line} relative import {name}")
        elif any(_inside(name, own) for own in OURS) and not any(
            _inside(name, allowed) for allowed in ARROWS[package]
        ):
            found.append(f"{path}:{line} {package} must not import {name}")
        elif _inside(name, "runpy") or name == "importlib.import_module":
            found.append(f"{path}:{line} {name} hides an import")
    for node in ast.walk(ast.parse(text)):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        if name in {"import_module", "__import__"}:
            found.append(f"{path}:{node.lineno} {name} hides an import")  # type: ignore[attr-defined]
    return found


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def _unsafe_call(node: ast.Call) -> str:
    call, given = _called(node), {k.arg: getattr(k.value, "value", None) for k in node.keywords}
    if call == "torch.load" and given.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    if call in {"np.load", "numpy.load"} and given.get("allow_pickle", False) is not False:
        return "numpy.load with pickles"
    if call in {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}:
        return call
    if given.get("shell", False) is not False:
        return "shell"
    if "trust_remote_code" in given or given.get("weights_only", True) is not True:
        return f"{call} trusts what it loads"
    return ""


def unsafe_code(path: str, text: str) -> list[str]:
    """Ways in which data or a configuration could run code. Tests may name them in strings."""
    found = []
    for node in ast.walk(ast.parse(text)):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        problem = name if name in {"instantiate", "trust_remote_code"} else ""
        if isinstance(node, ast.Call):
            problem = problem or _unsafe_call(node)
        if problem:
            found.append(f"{path}:{getattr(node, 'lineno', 0)} {problem}")
    for line, name in imports(text):
        if any(_inside(name, module) for module in PICKLES):
            found.append(f"{path}:{line} {name}: no pickle is written or read")
        if name.split(".")[-1] == "instantiate":
            found.append(f"{path}:{line} {name}")
    return found


def forbidden_text(path: str, text: str) -> list[str]:
    """Words that must not stand in code or configuration, comments included."""
    words = ["_" + "target_", "weights_only=" + "False", "trust_remote_code", "shell=" + "True"]
    if path.endswith((".yaml", ".yml")):
        words += ["instantiate", "oc.env"]
    # Whole words: `num_target_tokens` is fine.
    return [f"{path}: {word}" for word in words if re.search(rf"(?<!\w){word}(?!\w)", text)]


def deepspeed_launcher(path: str, text: str) -> list[str]:
    """torchrun starts every run."""
    return [f"{path}: {match[0]}" for match in _LAUNCHER.finditer(text)]


def absolute_paths(path: str, text: str) -> list[str]:
    """A path of one machine works on no other."""
    return [f"{path}: {match[0]}" for match in _ABSOLUTE.finditer(text)]


def not_ascii(path: str, text: str) -> list[str]:
    """ASCII only, so that every terminal and diff shows the same."""
    return [
        f"{path}:{number} {line.strip()[:40]!r}"
        for number, line in enumerate(text.splitlines(), 1)
        if not line.isascii()
    ]


def optional_imports(text: str) -> set[str]:
    """Return the optional dependencies that a file imports."""
    names = {name.split(".")[0] for _, name in imports(text)}
    return names & set(OPTIONAL)


def environment_reads(path: str, text: str) -> list[str]:
    """Reads of environment variables other than the ranks' and the launcher's own."""
    found = []
    for node in ast.walk(ast.parse(text)):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            key = node.slice if ast.unparse(node.value) == "os.environ" else None
        elif isinstance(node, ast.Call) and _called(node) in {"os.environ.get", "os.getenv"}:
            key = node.args[0]
        if key is not None and getattr(key, "value", None) not in ENVIRONMENT:
            found.append(f"{path}:{node.lineno} reads {ast.unparse(key)}")  # type: ignore[attr-defined]
    return found


def loose_schemas(path: str, text: str) -> list[str]:
    """Config schemas need keyword-only fields and slots, and must not be frozen or use Literal."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for decorator in node.decorator_list:
            said = ast.unparse(decorator)
            if not said.startswith("dataclass"):
                continue
            if "kw_only=True" not in said or "slots=True" not in said or "frozen=True" in said:
                found.append(f"{path}:{node.lineno} {node.name}: @{said}")
        if "Literal[" in ast.unparse(node):
            found.append(f"{path}:{node.lineno} {node.name}: Literal; use an Enum")
    return found
