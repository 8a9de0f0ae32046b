"""A small teacher of the Gemma 3 architecture, fitted from scratch to labelled comments.

It stands in for a large language model where none can be had: it has a tokenizer and a chat template of its own, reads
the same prompts, and loads through transformers and vLLM like any other.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim import _muon
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from pipeline.task.task import Task
from pipeline.task.tokenization import TeacherTokenizer
from pipeline.task.values import Values

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
PAD, EOS, BOS, START_OF_TURN, END_OF_TURN = range(len(SPECIAL_TOKENS))
IGNORED = -100  # the target of a position that takes no part in the loss
BATCH = 32  # examples

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

Labelled = Sequence[tuple[str, Values]]  # comments with their labels, in the order of the task's fields
Example = tuple[list[int], list[int]]  # ids of a prompt and of its answer, which ends with the end-of-turn token


@dataclass(frozen=True)
class Fit:
    """How large the teacher is and how long it is fitted."""

    vocabulary: int = 1536
    width: int = 96
    layers: int = 3
    heads: int = 2
    mlp: int = 256
    epochs: int = 4


DEFAULT_FIT = Fit()


def fit_teacher(folder: str, labelled: Labelled, task: Task, seed: int, fit: Fit = DEFAULT_FIT) -> None:
    """Fits a teacher to labelled comments and saves it as a folder that transformers and vLLM load.

    On CPU the allocator decides the speed (see `pipeline.base.runtime`). Where other processes want the cores, set
    OMP_NUM_THREADS=1.
    """
    tokenizer = train_tokenizer(labelled, task, fit.vocabulary)
    examples = make_examples(labelled, task, TeacherTokenizer(tokenizer))
    torch.set_num_threads(min(torch.get_num_threads(), 8))  # a step is too small for more
    torch.manual_seed(seed)
    model = make_model(fit)
    log.info("fitting a teacher of %.1f M parameters to %d comments", model.num_parameters() / 1e6, len(examples))
    train(model, examples, fit.epochs, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(labelled: Labelled, task: Task, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of user turns and answers, with Gemma's chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
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


def make_examples(labelled: Labelled, task: Task, tokenizer: TeacherTokenizer) -> list[Example]:
    """The very tokens inference sees: prompts as extraction makes them, answers as the output language writes them."""
    prompts = tokenizer.prompt(task).ids([body for body, _ in labelled], tokenizer)
    answers = tokenizer.encode([task.render(values) for _, values in labelled])
    return [(prompt, [*answer, tokenizer.end_id]) for prompt, answer in zip(prompts, answers, strict=True)]


def make_model(fit: Fit) -> Gemma3ForCausalLM:
    """A model with random weights in float32; every second layer attends to the whole text."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(fit.layers)]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=fit.vocabulary,
            hidden_size=fit.width,
            intermediate_size=fit.mlp,
            num_hidden_layers=fit.layers,
            num_attention_heads=fit.heads,
            num_key_value_heads=1,
            head_dim=64,  # vLLM's CPU attention knows no smaller one
            query_pre_attn_scalar=64,
            layer_types=kinds,
            sliding_window=128,
            max_position_embeddings=512,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=END_OF_TURN,
        )
    )


def train(model: Gemma3ForCausalLM, examples: list[Example], epochs: int, seed: int) -> None:
    """Minimises the mean cross-entropy of the answers' tokens, in place.

    Muon takes the layers' matrices, AdamW the embedding and the norms' scales: within the few hundred steps a demo can spare,
    AdamW alone was seen to learn hardly more than the format.
    """
    batches = [batch for epoch in range(epochs) for batch in make_batches(examples, seed + epoch)]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=2.5e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    cycle = partial(OneCycleLR, total_steps=len(batches) + 1, pct_start=0.05, cycle_momentum=False)
    schedules = [cycle(optimizer, optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
    model.train()
    _muon._zeropower_via_newtonschulz = orthogonal  # PyTorch's is in bfloat16, with which some CPUs are many times slower
    for step, (inputs, targets) in enumerate(batches):
        loss = answer_loss(model, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0 or step + 1 == len(batches):
            log.info("step %d of %d: loss %.4f", step, len(batches), loss.item())


def orthogonal(grad: torch.Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> torch.Tensor:
    """What Muon steps by, as `torch.optim` computes it but in float32: the gradient [M, N] with all singular values near 1, by
    the quintic Newton-Schulz iteration (Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024).
    """
    a, b, c = ns_coefficients
    tall = grad.shape[0] > grad.shape[1]
    x = (grad.T if tall else grad) / grad.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def answer_loss(model: Gemma3ForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, the end-of-turn token included; the output head sees their positions alone.
    No mask is needed: padding is on the right, where causal attention cannot see it.
    """
    counted = targets != IGNORED
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[counted]), targets[counted])


def make_batches(examples: list[Example], seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of (inputs, targets), int64 [B, S] each; examples of about one length share a batch."""
    rng = random.Random(seed)
    order = sorted(examples, key=lambda example: len(example[0]) + rng.random())
    batches = [collate(order[i : i + BATCH]) for i in range(0, len(order), BATCH)]
    rng.shuffle(batches)
    return batches


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of some examples, int64 [B, S] each, padded on the right."""
    inputs = [torch.tensor((prompt + answer)[:-1]) for prompt, answer in examples]
    targets = [torch.tensor([IGNORED] * (len(prompt) - 1) + answer) for prompt, answer in examples]
    return pad_sequence(inputs, True, PAD), pad_sequence(targets, True, IGNORED)
