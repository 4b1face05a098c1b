"""Stage 6, first part: sample several replies to each request, to be ranked.

In:       a trained Thinker and Talker, requests (dialogues with their replies), a codec
Trained:  nothing
Sampling: the Thinker runs once a request, the Talker draws each reply anew; on plain replicas, one
          of each model per rank
Out:      `candidates/`: shards with dialogue, text, codes, wave, seed, sampling settings, model

Then `omni-train talker rank` hears them and `omni-train talker pairs` makes the pairs of stage 7
(section 4.3 of the report, arXiv 2503.20215). A job that was stopped goes on with what is missing,
on any number of ranks. No codes of recordings are needed, so this runs on a released model too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from omni_train.config.errors import ConfigError
from omni_train.config.recipe import recipe_main
from omni_train.data.tokenizer import load_tokenizer
from omni_train.data.types import ProcessingConfig
from omni_train.engine.deepspeed import Precision
from omni_train.engine.run import RunConfig, start_run
from omni_train.models.config import ModelConfig
from omni_train.preferences.candidates import CandidateConfig, sample_candidates
from omni_train.speech.speaking import load_replicas
from omni_train.tracking.config import TrackingConfig

CANDIDATES_DIR = "candidates"


@dataclass(kw_only=True, slots=True)
class TalkerCandidatesConfig:
    """Root config of `talker_candidates`."""

    run: RunConfig
    model: ModelConfig
    requests: CandidateConfig
    processing: ProcessingConfig = field(default_factory=ProcessingConfig)
    precision: Precision = Precision.bf16
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def validate(cfg: TalkerCandidatesConfig, world_size: int) -> None:
    """Refuse random weights, and too few samples to prefer one."""
    if not cfg.model.init_from:
        raise ConfigError(
            key="model.init_from",
            value="",
            rule="what random weights say is not worth ranking",
            remedy="give a run of talker_icl, a checkpoint, or a released directory",
        )
    answers = cfg.requests.sampling.num_samples + cfg.requests.recordings
    if answers < 2:
        raise ConfigError(
            key="requests.sampling.num_samples",
            value=cfg.requests.sampling.num_samples,
            rule="a pair needs two answers to one request",
            remedy="sample 8, say",
        )


@recipe_main(TalkerCandidatesConfig, "talker_candidates", validate)
def main(raw: DictConfig) -> None:
    """Sample the candidates."""
    cfg: TalkerCandidatesConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run, stage="talker_candidates", settings=cfg, typed=raw, tracking=cfg.tracking
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        replicas = load_replicas(cfg.model, tokenizer, cfg.precision, run.world.device)
        folder = run.dir / CANDIDATES_DIR
        count = sample_candidates(cfg.requests, replicas, tokenizer, cfg.processing, folder, run)
        run.say(f"{count} candidates in {folder}")


if __name__ == "__main__":
    main()
