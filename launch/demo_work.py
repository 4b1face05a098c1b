"""What the demo does beside its recipes: codes, the ranking of candidates, pairs.

Each is finished or continued where it was stopped, in worker processes of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WORKERS = 2
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes for one set of spoken replies, by the codec of the demo.

    Args:
        subset: directory under `corpus/`, and under `codes/`.
    """

    subset: str

    @property
    def name(self) -> str:
        """Of its row on the screen."""
        return f"codes_{Path(self.subset).name}"

    def __call__(self, root: Path, report: Report, *, quick: bool) -> str:
        """Write the set again with codes beside the speech; return what to show."""
        from data_pipelines.codes import add_codes
        from omni_train.speech.codec import CodecConfig

        made = add_codes(
            root / "corpus" / self.subset,
            root / "codes" / self.subset,
            CodecConfig(path=str(root / "speech_codec")),
            tokenizer_dir=str(root / "corpus" / "tokenizer"),
            # A worker would take longer to start than a small set takes.
            num_workers=0 if quick else WORKERS,
            report=report,
        )
        assert made is not None, "all parts at once"
        return f"{made.num_samples} spoken replies"


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores of the candidates: word errors, and pauses at the commas."""

    name: str = "ranking"

    def __call__(self, root: Path, report: Report, *, quick: bool) -> str:
        """Hear and score what is not scored yet; return what to show."""
        from data_pipelines.demo_content import VOCABULARY
        from omni_train.preferences.ranking import RankConfig, rank
        from omni_train.speech.asr import AsrConfig, AsrKind

        listener = AsrConfig(kind=AsrKind.pocketsphinx, vocabulary=list(VOCABULARY))
        # A wrong pause at one of two boundaries weighs as much as a wrong word of three.
        config = RankConfig(recognizers=[listener], pause_weight=0.7)
        found = rank(
            root / "talker_candidates" / "candidates",
            root / self.name,
            config,
            num_workers=0 if quick else WORKERS,
            report=report,
        )
        return f"{found['scored']} of {found['candidates']} candidates scored"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Preference pairs of the ranked candidates."""

    name: str = "pairs"

    def __call__(self, root: Path, report: Report, *, quick: bool) -> str:
        """Make the pairs, or find them made; return what to show."""
        from data_pipelines.preferences import PairConfig, RecordingUse, build_pairs

        config = PairConfig()
        if quick:
            # A Talker of a few steps says nothing that could be preferred to a recording.
            config = PairConfig(recording=RecordingUse.chosen, max_length_ratio=1000.0)
        made = build_pairs(
            root / "talker_candidates" / "candidates",
            root / "ranking",
            root / self.name,
            config,
            tokenizer_dir=str(root / "corpus" / "tokenizer"),
        )
        return f"{made['pairs']} pairs, pauses decide {made['ordered_by_pauses']}"


Work = Codes | Ranking | Pairs
