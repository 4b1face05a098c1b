"""The preference loss against trl.DPOTrainer on the same pairs: value, gradients, metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

from omni_train.config.errors import ConfigError
from omni_train.objectives.preference import (
    PairTargets,
    PreferenceConfig,
    PreferenceLoss,
    preference,
)
from omni_train.objectives.types import StepOutput
from tests.numerics.samples import small_tokenizer

# (prompt, chosen, rejected); no two of one length.
PAIRS = (
    ("which word", " was said", " is on the picture"),
    ("what is", " on the picture", " said"),
    ("the word was", " what", " which word was said"),
)
BETA = 0.3


def language_model(vocab: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, **sizes, **heads)).float()
    with torch.no_grad():
        for param in model.parameters():
            # Far enough from flat for the losses to differ.
            param.mul_(2.0)
    return model


@dataclass
class Pairs:
    """A padded micro-batch of TRL's: M chosen rows, then M rejected ones."""

    inputs: dict[str, Tensor]
    pairs: PairTargets


class Answers(nn.Module):
    """Log-probabilities of the answers' tokens, one after the other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Pairs) -> Tensor:
        ids, seen = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        logprobs = self.model(input_ids=ids, attention_mask=seen).logits[:, :-1].log_softmax(-1)
        of_tokens = logprobs.gather(2, ids[:, 1:, None])[..., 0]
        return of_tokens[batch.inputs["completion_mask"][:, 1:].bool()]


def as_pairs(inputs: dict[str, Tensor], reference: nn.Module) -> Pairs:
    mask = inputs["completion_mask"][:, 1:].bool()
    count = mask.shape[0] // 2
    # TRL's row r is pair r % M.
    order = torch.arange(count).repeat(2) * 2 + torch.arange(2).repeat_interleave(count)
    answers = order[:, None].expand_as(mask)[mask]
    lengths = torch.zeros(2 * count).index_add(0, answers, torch.ones(len(answers)))
    pairs = PairTargets(answers, lengths, torch.zeros(2 * count))
    batch = Pairs(inputs, pairs)
    with torch.no_grad():
        logprobs = Answers(reference)(batch)
    pairs.reference = torch.zeros(2 * count).index_add(0, answers, logprobs)
    return batch


def trainer(folder: Path, **settings: Any) -> DPOTrainer:
    tokenizer = small_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    vocab = len(tokenizer)
    args = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=len(PAIRS),
        **settings,
    )
    names = ("prompt", "chosen", "rejected")
    rows = [dict(zip(names, pair, strict=True)) for pair in PAIRS]
    return DPOTrainer(
        model=language_model(vocab, 1),
        ref_model=language_model(vocab, 2),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"loss_type": ["sigmoid_norm"]}, {"loss": PreferenceLoss.sigmoid_norm}),
    ({"loss_type": ["robust"], "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, {"sft_weight": 0.2}),
    ({"loss_type": ["sft"]}, {"loss": PreferenceLoss.sft}),
]


@pytest.mark.parametrize(("theirs", "ours"), CASES, ids=lambda value: "-".join(map(str, value)))
def test_loss_gradients_and_metrics_are_trls(
    tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    peer = trainer(tmp_path, **theirs)
    config = PreferenceConfig(beta=BETA, **ours)
    model = Answers(language_model(peer.model.config.vocab_size, 1))
    # TRL changes the forward of its own models.
    reference = language_model(peer.model.config.vocab_size, 2)
    whole = next(iter(peer.get_train_dataloader()))
    per_token = config.loss is PreferenceLoss.sft or config.sft_weight
    # What averages over tokens is compared pair by pair; see the module.
    batches = [pair_of(whole, m) for m in range(len(PAIRS))] if per_token else [whole]
    peer.model.train()
    expected, output = 0.0, StepOutput(torch.zeros(()))
    for inputs in batches:
        loss = peer.compute_loss(peer.model, dict(inputs)) / len(batches)
        loss.backward()
        expected += float(loss.detach())
        output = joined(output, preference(model, as_pairs(inputs, reference), config))
    assert output.num_tokens == len(PAIRS)
    (output.loss / output.num_tokens).backward()
    assert float(output.loss.detach()) / output.num_tokens == pytest.approx(expected, abs=1e-5)
    for name, gradient in gradients(peer.model).items():
        torch.testing.assert_close(gradients(model.model)[name], gradient, rtol=1e-5, atol=1e-5)
    logged = {name: sum(of) / len(of) for name, of in peer._metrics["train"].items()}
    assert set(output.metrics) <= set(logged)
    for name, (total, count) in output.metrics.items():
        assert float(total) / float(count) == pytest.approx(logged[name], abs=1e-5, rel=1e-5), name
    names = {f"rewards/{what}" for what in ("chosen", "rejected", "accuracies", "margins")}
    assert set(output.metrics) == names | {"logps/chosen", "logps/rejected"}


def pair_of(inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One pair of a micro-batch of TRL's."""
    rows = [number, number + len(PAIRS)]
    return {name: value[rows] for name, value in inputs.items()}


def joined(one: StepOutput, other: StepOutput) -> StepOutput:
    """Sums of two micro-batches, as the loop adds them up."""
    metrics = {
        name: tuple(a + b for a, b in zip(one.metrics.get(name, (0.0, 0)), pair, strict=True))
        for name, pair in other.metrics.items()
    }
    return StepOutput(one.loss + other.loss, metrics, one.num_tokens + other.num_tokens)  # type: ignore[arg-type]


def test_a_pack_without_pairs_is_zero_with_a_graph() -> None:
    weight = torch.ones(1, requires_grad=True)
    empty = PairTargets(torch.zeros(1, dtype=torch.long), torch.zeros(0), torch.zeros(0))
    batch = Pairs({}, empty)

    class Dummy(nn.Module):
        def forward(self, batch: Pairs) -> Tensor:
            return -3.0 * weight

    output = preference(Dummy(), batch, PreferenceConfig())
    output.loss.backward()
    assert (output.loss.item(), output.num_tokens) == (0.0, 0)
    assert weight.grad is not None
    assert float(weight.grad) == 0.0


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"beta": 0.0}, "preference.beta"),
        ({"label_smoothing": 0.5}, "preference.label_smoothing"),
        ({"sft_weight": -1.0}, "preference.sft_weight"),
        ({"loss": PreferenceLoss.sft, "sft_weight": 0.2}, "preference.sft_weight"),
        ({"loss": PreferenceLoss.sft, "label_smoothing": 0.2}, "preference.label_smoothing"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        PreferenceConfig(**values)
    assert error.value.key == key
