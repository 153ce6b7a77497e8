"""The conformance suite of opensora_sp: tiny models, and what Open-Sora 1.2 computed on them."""
