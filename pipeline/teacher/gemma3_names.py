"""Names of tensors in Gemma 3 checkpoints, which are others beside a vision tower."""

# Older checkpoints (the Hub's) first, then those transformers 5 writes.
PREFIXES = {"language_model.": "", "model.language_model.": "model."}
VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def language_name(name: str) -> str | None:
    """A tensor's name in the language model alone; None for the vision tower's."""
    if name.startswith(VISION):
        return None
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return name if prefix is None else PREFIXES[prefix] + name.removeprefix(prefix)
