"""With a protection taken out, the test of its attack fails: the tests hold what they claim to."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_train.config import load
from omni_train.data import clip, index, scan, stores
from omni_train.engine import checkpoint_files
from omni_train.models import weights
from tests.security import test_hostile_inputs as attacks
from tests.security.evil import SECRET
from tests.unit.engine import test_checkpoint_files as flips

Patch = Callable[[pytest.MonkeyPatch], Any]


def widened(patch: pytest.MonkeyPatch) -> None:
    """torch's restricted reader lets one more class through."""
    real = torch.serialization.safe_globals
    patch.setattr(torch.serialization, "safe_globals", lambda names: real([*names, Fraction]))


def nothing(module: Any, name: str, returned: Any = None) -> Patch:
    return lambda patch: patch.setattr(module, name, lambda *_, **__: returned)


WITHOUT: dict[str, tuple[Patch, str]] = {
    "the list of what a pickle may name": (widened, "a DeepSpeed shard, another class"),
    "the look for pickled weights": (
        nothing(weights, "refuse_pickles"),
        "weights of another project, protocol 0",
    ),
    "the list of schemes": (
        lambda patch: patch.setattr(stores, "split_scheme", lambda url: ("file", str(url))),
        "address 'pipe:touch {0}'",
    ),
    "the names of a tar's members": (nothing(scan, "_check_name"), "tar: climbing"),
    "the keys of an index": (nothing(index, "_check_keys"), "an index whose keys are paths"),
    "the list of codecs": (
        nothing(clip, "_check_codec"),
        "clip: a decoder that is not on the list",
    ),
    "the look at Hydra's own section": (
        nothing(load, "_check_hydra"),
        "YAML: callbacks without a target",
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_it_the_attack_succeeds(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    remove, attack = WITHOUT[name]
    remove(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        attacks.test_nothing_runs_and_it_is_refused(place, tmp_path, attack)
    assert (place / SECRET).is_dir()


def test_without_hashes_a_flipped_bit_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "verify_file", lambda path, record: None)
    with pytest.raises(AssertionError):
        flips.test_every_flipped_bit_is_found(tmp_path)
