"""The Talker as it is trained: Thinker states and an index of places in, log-probabilities out.

transformers' `Talker.forward` has no loss and takes its generation path with a mask (RECIPE.md
section 5), so projection, model and head are called one by one. Every call runs all of them, once,
whatever the pack holds: the same gathers on every rank under ZeRO-3.

The Talker reads a few rows of the Thinker's table: tts text eos and pad, and the speakers. It keeps
its own copy of them, so that it can train and speak without the Thinker in memory (from cached
states), and so that the row of a new speaker is a parameter group of its own.

Letters: T tokens of the Thinker's pack, E its width, R rows of its table that the Talker keeps, S
positions of the Talker's pack, C of them with a codec id, H the Talker's width, N targets.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniTalkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniTalkerForConditionalGeneration,
)

from omni_train.data.types import Batch, ModelSpec
from omni_train.models.attention import packed_hidden, register_attention
from omni_train.models.talker_layout import SpeechBatch, TalkerBatch, TalkerSpec
from omni_train.models.thinker import LogProbHead, ThinkerForTraining
from omni_train.models.weights import BuildReport


class Talker(Qwen2_5OmniTalkerForConditionalGeneration):
    """transformers' Talker with the rows it reads of the Thinker's table and a forward to train it.

    Its `codec_head` is a LogProbHead. `text_rows` is [R - new speakers, E]; where there are new
    speakers, `speaker_rows` holds theirs.

    Args:
        config: of transformers' Talker.
        spec: ids and rows.
    """

    def __init__(self, config: Qwen2_5OmniTalkerConfig, spec: TalkerSpec) -> None:
        super().__init__(config)
        self.spec = spec
        self.codec_head = LogProbHead(config.hidden_size, config.vocab_size, bias=False)
        new, width = spec.num_new_speakers, config.embedding_size
        self.text_rows = nn.Embedding(len(spec.row_ids) - new, width)
        if new:
            self.speaker_rows = nn.Embedding(new, width)
        self.model.set_attn_implementation(register_attention())

    def rows(self) -> Tensor:
        """Return the rows of the Thinker's table [R, E], in the order of `spec.row_ids`."""
        tables = [self.text_rows]
        if self.spec.num_new_speakers:
            tables.append(self.speaker_rows)
        device = self.codec_head.weight.device
        # Through the modules, so that ZeRO-3 gathers them.
        return torch.cat([t(torch.arange(t.num_embeddings, device=device)) for t in tables])

    def project(self, text: Tensor, codec_index: Tensor, codec_ids: Tensor) -> Tensor:
        """Return the model's inputs [S, H].

        Args:
            text: [S, E], the text item of each position.
            codec_index: int64 [C], positions that also have a codec id.
            codec_ids: int64 [C].
        """
        codec = self.model.embed_tokens(codec_ids)
        projected: Tensor = self.thinker_to_talker_proj(text.index_add(0, codec_index, codec))
        return projected

    def hidden(self, states: Tensor, batch: TalkerBatch) -> Tensor:
        """Return the last hidden states [1, S, H] of a pack, after the final norm.

        Args:
            states: [T, E], see `thinker_states`.
            batch: which of them goes where.
        """
        rows = self.rows()
        text = torch.cat([states.to(rows.dtype), rows]).index_select(0, batch.text_index)
        embeds = self.project(text, batch.codec_index, batch.codec_ids)[None]
        return packed_hidden(self.model, embeds, batch.position_ids, batch.segments)

    def logprobs(self, states: Tensor, batch: TalkerBatch) -> Tensor:
        """Return the log-probabilities float32 [N] of the pack's targets; see `hidden`."""
        hidden = self.hidden(states, batch)[0].index_select(0, batch.target_index)
        logprobs: Tensor = self.codec_head(hidden, batch.target_ids)
        return logprobs


class TalkerForTraining(nn.Module):
    """The Talker alone, trained from cached Thinker states.

    Args:
        talker: the model.
    """

    def __init__(self, talker: Talker) -> None:
        super().__init__()
        self.talker = talker
        # Where each tensor came from, and what data workers must know of the Thinker; set by those
        # who build it.
        self.report = BuildReport()
        self.spec: ModelSpec

    def forward(self, batch: SpeechBatch) -> Tensor:
        """Return the log-probabilities float32 [N] of the pack's targets."""
        assert batch.states is not None, "this model has no Thinker to make the states"
        return self.talker.logprobs(batch.states, batch.talker)


class OmniForTraining(ThinkerForTraining):
    """Thinker and Talker under one engine.

    Args:
        thinker, talker: built apart; their parts are taken over.
        joint: whether gradients flow into the Thinker. Without, its pass records no graph.
    """

    def __init__(
        self, thinker: ThinkerForTraining, talker: TalkerForTraining, *, joint: bool
    ) -> None:
        super().__init__(thinker.thinker)
        self.spec = thinker.spec
        self.report = BuildReport(
            loaded=thinker.report.loaded | talker.report.loaded,
            initialised=thinker.report.initialised + talker.report.initialised,
            unused=talker.report.unused,
        )
        self.talker = talker.talker
        self.joint = joint

    def forward(self, batch: Batch | SpeechBatch, *, score: bool = False) -> Tensor:
        """Return the log-probabilities float32 [N]: of text targets, or of codec targets."""
        if isinstance(batch, Batch):
            return super().forward(batch, score=score)
        assert not score, "codes are scored by ear"
        assert batch.thinker is not None, "this model makes the states itself"
        with nullcontext() if self.joint else torch.no_grad():
            states = thinker_states(self, batch.thinker)
        return self.talker.logprobs(states, batch.talker)


def thinker_states(model: ThinkerForTraining, batch: Batch) -> Tensor:
    """Return what the Talker reads of a pack, [T, E]: last hidden state plus input embedding.

    The embedding is zero at media placeholders, where the hidden state alone speaks.

    Args:
        model: the Thinker; runs with or without gradients as the caller has it.
        batch: a pack of prompts and replies.
    """
    embeds = model.embed(batch)
    language_model = model.thinker.model.language_model
    hidden = packed_hidden(language_model, embeds, batch.position_ids, batch.segments)
    media = torch.cat([batch.vision_index, batch.audio_index])
    return hidden[0] + embeds[0].index_fill(0, media, 0.0)
