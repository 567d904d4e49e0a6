"""Code that travels with an exported folder, so that transformers loads it without this project (`remote_code`)."""
