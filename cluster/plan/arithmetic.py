"""What one answer, one example and their storage take by published peaks. Pure: numbers in, seconds and bytes out.

N is a model's parameters. A forward pass takes 2·N FLOPs a token and a backward pass twice that (Kaplan et al., "Scaling Laws
for Neural Language Models", 2020, section 2.1); attention over the short sequences of a task adds little and is left out.
MFU is the share of the peak FLOP/s that useful arithmetic reaches (Chowdhery et al., "PaLM", 2022, appendix B).
"""

from __future__ import annotations

FORWARD_FLOPS, TRAIN_FLOPS = 2, 6  # a parameter and token
FORWARD_SHARE = FORWARD_FLOPS / TRAIN_FLOPS  # of a training example's time, for one that is only read
ADAMW_BYTES = 28  # a parameter and step: weight, gradient and two float32 moments read, all but the gradient written
STATE_BYTES = 12  # a parameter in a checkpoint: float32 weight and two moments
WEIGHT_BYTES = 4  # a parameter of a finished student, or of an exchange of gradients
LOGIT_BYTES, LSE_BYTES = 2, 3 * 4  # float16 a watched token; float32 log-sum-exps at three temperatures
COMPACT = 13  # float16 shards take so many times the bytes of compact ones (docs/log.md)
CHINCHILLA = 20  # tokens a parameter (Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022)


def prefill_seconds(params: float, tokens: float, flops_per_second: float, mfu: float) -> float:
    """Reading a prompt: 2·N FLOPs a token."""
    return FORWARD_FLOPS * params * tokens / (flops_per_second * mfu)


def decode_seconds(
    params: float,
    tokens: float,
    calls: float,
    together: int,
    weight_bytes: float,
    flops_per_second: float,
    mfu: float,
    bytes_per_second: float,
) -> float:
    """Writing an answer: the slower of its arithmetic and of reading the weights (the roofline of Williams et al., 2009).

    Args:
        tokens: of the answer; those of forced runs are computed too, several in one call.
        together: answers that share a call, and its one reading of all weights.
    """
    return max(prefill_seconds(params, tokens, flops_per_second, mfu), calls * weight_bytes / (together * bytes_per_second))


def example_seconds(params: float, tokens: float, flops_per_second: float, mfu: float) -> float:
    """Training on one example: 6·N FLOPs a token, N without the embedding and the output head."""
    return TRAIN_FLOPS * params * tokens / (flops_per_second * mfu)


def update_seconds(params: float, bytes_per_second: float) -> float:
    """AdamW's update of all parameters, whatever the batch: it only moves bytes."""
    return ADAMW_BYTES * params / bytes_per_second


def shard_bytes(steps: float, watched: int, compact: bool) -> float:
    """Of one example's logits: a float16 a watched token and three float32 a step, before Parquet's own compression."""
    raw = steps * (watched * LOGIT_BYTES + LSE_BYTES)
    return raw / COMPACT if compact else raw
