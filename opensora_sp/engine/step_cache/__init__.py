"""Step caches: which denoising steps are computed, and what fills the others."""
