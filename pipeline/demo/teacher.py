"""A small teacher of the Gemma 3 architecture, fitted from scratch to labelled comments.

It stands in for a large language model where none can be had: it has a tokenizer and a chat template of its own, reads
the same prompts, and loads through transformers and vLLM like any other.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.task.task import Task, Values
from pipeline.task.tokenization import TeacherTokenizer

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
PAD, EOS, BOS, START_OF_TURN, END_OF_TURN = range(len(SPECIAL_TOKENS))
MAX_THREADS = 8  # a step is too small for more
IGNORED = -100  # the target of a position that takes no part in the loss

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Fit:
    """How large the teacher is and how it is fitted."""

    vocabulary: int = 1536
    width: int = 96
    layers: int = 3
    heads: int = 2
    mlp: int = 256
    sliding_window: int = 128
    epochs: int = 4
    batch: int = 32  # examples
    matrix_lr: float = 2.5e-2
    other_lr: float = 6e-3
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.1


DEFAULT_FIT = Fit()


@dataclass(frozen=True)
class Example:
    """A prompt with its answer, as token ids; the answer ends with the end-of-turn token."""

    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        """Tokens the model reads: all but the last."""
        return len(self.prompt) + len(self.answer) - 1


def fit_teacher(folder: str, comments_path: str, task: Task, seed: int, fit: Fit = DEFAULT_FIT) -> None:
    """Fits a teacher to labelled comments and saves it as a folder that transformers and vLLM load.

    On CPU the allocator decides the speed: set glibc's MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and
    MALLOC_TOP_PAD_ before the process starts. Where other processes want the same cores, OMP_NUM_THREADS=1 is faster.
    """
    start = time.monotonic()
    labelled = read_labelled(comments_path, task)
    tokenizer = train_tokenizer(labelled, task, fit.vocabulary)
    examples = make_examples(labelled, task, TeacherTokenizer(tokenizer))
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))  # all cores, or OMP_NUM_THREADS
    torch.manual_seed(seed)
    model = make_model(fit)
    log.info("fitting a teacher of %.1f M parameters to %d comments", model.num_parameters() / 1e6, len(examples))
    train(model, examples, fit, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    log.info("fitted the teacher in %.0f s: %s", time.monotonic() - start, folder)


def read_labelled(path: str, task: Task) -> list[tuple[str, Values]]:
    """Comments with their labels, in the order of the task's fields; lines that are no such thing are left out.

    Raises:
        UserError: none is left.
    """
    content = storage.read_bytes(path)
    text = (gzip.decompress(content) if path.endswith(".gz") else content).decode()
    labelled = [found for line in text.split("\n") if (found := _labelled(line, task)) is not None]
    if not labelled:
        raise UserError(f"{path} holds no comment labelled with {', '.join(task.fields)}")
    return labelled


def _labelled(line: str, task: Task) -> tuple[str, Values] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    body, values = row.get("body"), tuple(row.get(field) for field in task.fields)
    fits = all(value in allowed for value, allowed in zip(values, task.fields.values(), strict=True))
    return (body, values) if isinstance(body, str) and fits else None


def train_tokenizer(labelled: list[tuple[str, Values]], task: Task, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of user turns and answers, with Gemma's chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"user\n{task.user_turn(body)}\nmodel\n{task.render(values)}" for body, values in labelled)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[END_OF_TURN],
        pad_token=SPECIAL_TOKENS[PAD],
        additional_special_tokens=list(SPECIAL_TOKENS[START_OF_TURN:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_examples(labelled: list[tuple[str, Values]], task: Task, tokenizer: TeacherTokenizer) -> list[Example]:
    """The very tokens inference sees: prompts as extraction makes them, answers as the output language writes them."""
    prompts = tokenizer.prompt(task).ids([body for body, _ in labelled], tokenizer)
    answers = tokenizer.encode([task.render(values) for _, values in labelled])
    return [Example(p, [*a, tokenizer.end_id]) for p, a in zip(prompts, answers, strict=True)]


def make_model(fit: Fit) -> Gemma3ForCausalLM:
    """A model with random weights in float32; every second layer attends to the whole text."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(fit.layers)]
    config = Gemma3TextConfig(
        vocab_size=fit.vocabulary,
        hidden_size=fit.width,
        intermediate_size=fit.mlp,
        num_hidden_layers=fit.layers,
        num_attention_heads=fit.heads,
        num_key_value_heads=1,
        head_dim=64,  # vLLM's CPU attention knows no smaller one
        query_pre_attn_scalar=64,
        layer_types=kinds,
        sliding_window=fit.sliding_window,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END_OF_TURN,
    )
    return Gemma3ForCausalLM(config)


def train(model: Gemma3ForCausalLM, examples: list[Example], fit: Fit, seed: int) -> None:
    """Minimises the mean cross-entropy of the answers' tokens, in place."""
    batches = [batch for epoch in range(fit.epochs) for batch in make_batches(examples, fit.batch, seed + epoch)]
    optimizers = make_optimizers(model, fit)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start = time.monotonic()
    model.train()
    for step, (inputs, targets) in enumerate(batches):
        loss = answer_loss(model, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * _one_cycle(step / len(batches), fit.warmup)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == len(batches):
            log.info("step %d of %d: loss %.4f, %.1f s", step, len(batches), loss.item(), time.monotonic() - start)


def make_optimizers(model: Gemma3ForCausalLM, fit: Fit) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms' scales.

    Within the few hundred steps a demo can spare, AdamW alone was seen to learn hardly more than the format.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(matrices, lr=fit.matrix_lr, weight_decay=fit.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=fit.other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _one_cycle(progress: float, warmup: float) -> float:
    """The learning rate's share of its peak: up in a line, down along a cosine."""
    if progress < warmup:
        return (progress + 0.01) / (warmup + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def answer_loss(model: Gemma3ForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, the end-of-turn token included.

    Args:
        model: the model, whose output head sees the answers' positions alone.
        inputs: int64 [B, S], padded on the right, where causal attention cannot see it: no mask is needed.
        targets: int64 [B, S], each position's next token, `IGNORED` outside the answer.
    """
    counted = targets != IGNORED
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[counted]), targets[counted])


def make_batches(examples: list[Example], size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of (inputs, targets), int64 [B, S] each; examples of about one length share a batch."""
    rng = random.Random(seed)
    order = sorted(range(len(examples)), key=lambda i: examples[i].length + rng.random())
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(batches)
    for batch in batches:
        yield collate([examples[i] for i in batch])


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of some examples, int64 [B, S] each, padded on the right."""
    longest = max(example.length for example in examples)
    inputs = torch.full((len(examples), longest), PAD)
    targets = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        inputs[row, : example.length] = torch.tensor((example.prompt + example.answer)[:-1])
        targets[row, len(example.prompt) - 1 : example.length] = torch.tensor(example.answer)
    return inputs, targets
