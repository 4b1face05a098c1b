"""Skips GPU tests where there is no GPU; makes one small corpus for the tests that read media."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import child_environment
from launch.stages import REPO


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's corpus at its quick size."""
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    command = [sys.executable, "-m", "data_pipelines.demo_corpus", "--quick", "--out", str(folder)]
    subprocess.run(command, cwd=REPO, env=child_environment(), check=True, timeout=240)
    return folder
