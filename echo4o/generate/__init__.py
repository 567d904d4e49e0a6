"""From prompts and reference images to images and text."""
