"""B2: log-mel frames of speech, against the feature extractor of the released processor.

Its default pads every sound to 300 s, and its mask cuts the frames out again; that is what
`Qwen2_5OmniProcessor` calls, and its worst. Its best is `padding="longest"`, which with one sound
pads nothing; the last frame then is another one, or missing. Frames are compared with the default's
before anything is timed, and their number must be equal.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor

from benchmarks import media
from benchmarks.report import compare, parser, show
from omni_train.speech.mel import log_mel

# Of 10 s the goal is PERF.md's; of other lengths the work is the same and only the padding shrinks.
GOALS = {5.0: 0.0, 10.0: 40.0, 30.0: 0.0}
# Against the same transform without padding; a twentieth is this machine's noise.
UNPADDED = 0.95
WHY = (
    "One call of each in turn: right after the peer's padded arrays ours takes several times what "
    "it takes in the rows against longest"
)


def main() -> int:
    """Run the table."""
    args = parser("Log-mel frames against transformers' feature extractor.").parse_args()
    torch.set_num_threads(1)
    extractor = WhisperFeatureExtractor(
        feature_size=128, n_fft=400, hop_length=160, chunk_length=300
    )

    def extract(wave: NDArray[np.float32], padding: str) -> Any:
        options = {"sampling_rate": media.RATE_HZ, "return_attention_mask": True}
        return extractor(wave, padding=padding, **options)

    rows = []
    for seconds, goal in GOALS.items():
        # Not a multiple of 10 ms, as sound is.
        wave = media.speech(seconds + 0.0043, seed=1)
        tensor = torch.from_numpy(wave)
        mel = log_mel(tensor).numpy()
        padded = extract(wave, "max_length")
        kept = padded["input_features"][0][:, : int(padded["attention_mask"].sum())]
        assert mel.shape == kept.shape, f"{mel.shape} frames, the peer has {kept.shape}"
        assert np.abs(mel - kept).max() <= 1e-5, f"frames differ by {np.abs(mel - kept).max()}"
        for padding, least in (("max_length", goal), ("longest", UNPADDED)):
            rows.append(
                compare(
                    f"{seconds:g} s, peer's padding={padding}",
                    lambda tensor=tensor: log_mel(tensor),
                    lambda wave=wave, padding=padding: extract(wave, padding),
                    goal=least,
                    pairs=args.pairs,
                    repeats=1 if padding == "max_length" else 10,
                    why=WHY,
                )
            )
    return show(rows, ("transformers", "torch", "numpy"), [], as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
