"""Hugging Face folders: export, verification, comparison, model card, upload."""
