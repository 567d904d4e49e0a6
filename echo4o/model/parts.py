"""Parameter names to the parts of the model that users think in."""

from __future__ import annotations


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    if name.startswith(("latent_pos_embed.", "vit_pos_embed.")):
        return "position tables"
    if name.startswith("vit_model."):
        return "vit"
    if name.startswith("connector."):
        return "connector"
    if name.startswith(("time_embedder.", "vae2llm.", "llm2vae.")):
        return "latent heads"
    if "moe_gen" in name:
        return "generation experts"
    if "embed_tokens" in name or "lm_head" in name:
        return "word embeddings"
    return "understanding experts"
