"""Turns a request into latents and frames: text, guidance, blocks, clips, decoding."""
