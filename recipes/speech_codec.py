"""Stage 0: a speech codec of one's own, wave to codes and back.

In:       shards with speech
Trained:  the codebook, by k-means on compressed mel frames
Frozen:   nothing; there is no network, so no DeepSpeed engine either
Loss:     mean squared error of a frame and its code
Out:      `codec/` in the run directory; word error rates by voice where `check` is set

Stands for the tokenizer that was never released (RECIPE.md section 6). A fit takes seconds to
minutes and is the same for the same seed on any number of ranks, so what was interrupted is simply
done again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from omni_train.config.errors import ConfigError
from omni_train.config.recipe import recipe_main
from omni_train.engine.run import RunConfig, start_run
from omni_train.evaluation.round_trip import RoundTripConfig, check_round_trip
from omni_train.speech.codec_fit import ClipSource, CodecFitConfig, fit_codec, speech_hashes
from omni_train.speech.mel_kmeans import CODEC_DIR, MelKMeansConfig
from omni_train.tracking.config import TrackingConfig


@dataclass(kw_only=True, slots=True)
class SpeechCodecConfig:
    """Root config of `speech_codec`."""

    run: RunConfig
    speech: dict[str, ClipSource] = field(default_factory=dict)
    codec: MelKMeansConfig = field(default_factory=MelKMeansConfig)
    kmeans: CodecFitConfig = field(default_factory=CodecFitConfig)
    check: RoundTripConfig | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def validate(cfg: SpeechCodecConfig, world_size: int) -> None:
    """Refuse a fit to nothing."""
    if not cfg.speech:
        raise ConfigError(
            key="speech",
            value={},
            rule="there is no speech to fit the codec to",
            remedy="add +speech.NAME.path=DIRECTORY",
        )


@recipe_main(SpeechCodecConfig, "speech_codec", validate)
def main(raw: DictConfig) -> None:
    """Fit the codec, save it, check it."""
    cfg: SpeechCodecConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run,
        stage="speech_codec",
        settings=cfg,
        typed=raw,
        data_hashes=speech_hashes(cfg.speech),
        tracking=cfg.tracking,
    ) as run:
        codec = fit_codec(cfg.codec, cfg.speech, cfg.kmeans, run)
        if run.is_main:
            codec.save(run.dir / CODEC_DIR)
        run.event("artifact", name=CODEC_DIR, codebook_xxh3=codec.fingerprint)
        if cfg.check is not None:
            check_round_trip(codec, cfg.check, run)


if __name__ == "__main__":
    main()
