"""Typos in the settings of real recipes: the message names the setting that was meant."""

from __future__ import annotations

import dataclasses
import random
import string
from typing import get_args, get_origin

import pytest

from omni_train.config.errors import ConfigError
from omni_train.config.keys import dotted_keys
from omni_train.config.load import CONF_DIR, check_overrides
from omni_train.config.register import Root, register_root
from recipes.evaluate import EvaluateConfig
from recipes.stage1_audio import Stage1AudioConfig
from recipes.talker_icl import TalkerIclConfig

COUNT = 200
RECIPES = {
    "stage1_audio": Stage1AudioConfig,
    "talker_icl": TalkerIclConfig,
    "evaluate": EvaluateConfig,
}
GROUPS = ("model", "optim", "deepspeed", "tracking")
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def neighbour(rng: random.Random, letter: str) -> str:
    """A key beside that of `letter`."""
    for row in KEYBOARD:
        if letter in row:
            at = row.index(letter)
            return rng.choice(row[max(0, at - 1) : at] + row[at + 1 : at + 2])
    return rng.choice(string.ascii_lowercase)


def typo(rng: random.Random, word: str) -> str:
    """Return `word` with one mistake, as fingers and memories make them."""
    letters = [n for n, c in enumerate(word) if c.isalpha()]
    at = rng.choice(letters)
    kind = rng.choice(["drop", "double", "swap", "beside", "dash", "upper", "section", "plural"])
    if kind == "double":
        return word[: at + 1] + word[at:]
    if kind == "swap" and at + 1 in letters and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == "beside":
        return word[:at] + neighbour(rng, word[at].lower()) + word[at + 1 :]
    if kind == "dash" and "_" in word:
        return word.replace("_", rng.choice(["-", ""]), 1)
    if kind == "upper":
        return word[:at] + word[at].upper() + word[at + 1 :]
    if kind == "section" and word.count(".") == 1:
        # The name alone, where no other section has it.
        return word.partition(".")[2]
    if kind == "plural":
        return word[:-1] if word.endswith("s") else f"{word}s"
    return word[:at] + word[at + 1 :]


def keys_of(root: Root) -> list[str]:
    """Every key that can be set, with a name where a mapping takes any."""
    known = dotted_keys(root.schema)
    return [
        key.replace("*", "mine")
        for key, hint in known.items()
        if not dataclasses.is_dataclass(hint) and get_origin(hint) is not dict
    ]


def meant(root: Root, override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_overrides(root, [override], [CONF_DIR])
    return str(caught.value)


def options() -> list[tuple[str, str]]:
    """(group, option) of the groups that are files."""
    return [
        (group, path.stem) for group in GROUPS for path in sorted((CONF_DIR / group).glob("*.yaml"))
    ]


def test_typos_in_settings_get_the_right_suggestion() -> None:
    rng = random.Random(7)
    roots = [register_root(name, schema) for name, schema in RECIPES.items()]
    wrong: list[str] = []
    made = 0
    while made < COUNT:
        root = rng.choice(roots)
        keys = keys_of(root)
        if rng.random() < 0.1:
            group, real = rng.choice(options())
            given = typo(rng, real)
            if given in [name for g, name in options() if g == group]:
                continue
            message = meant(root, f"{group}={given}")
        else:
            real = rng.choice(keys)
            given = typo(rng, real)
            names = [key.rpartition(".")[2] for key in keys]
            alone = "." not in given and "." in real
            # A name that may be any cannot be mistyped.
            renamed = "mine" in real and ".mine." not in given
            if given in keys or renamed or (alone and names.count(given) > 1):
                continue
            message = meant(root, f"{given}=1")
        made += 1
        if f"did you mean {real}?" not in message:
            wrong.append(f"{given} for {real}: {message}")
    print(f"{COUNT - len(wrong)} of {COUNT}", *wrong, sep="\n")
    assert len(wrong) <= 0.05 * COUNT, "\n".join(wrong)


@pytest.mark.parametrize("unlike", ["qqqqqqqq", "x.y.z", "banana"])
def test_nothing_is_suggested_for_what_is_like_nothing(unlike: str) -> None:
    root = register_root("stage1_audio", Stage1AudioConfig)
    assert "did you mean" not in meant(root, f"{unlike}=1")


def test_every_kind_of_section_is_among_the_keys() -> None:
    keys = keys_of(register_root("stage1_audio", Stage1AudioConfig))
    assert {"run.dir", "optim.groups.mine.lr", "data.sources.mine.path"} <= set(keys)
    assert not [key for key in keys if get_args(key)]
