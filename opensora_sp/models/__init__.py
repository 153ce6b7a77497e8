"""Single-device models of Open-Sora 1.2: STDiT3, T5, both VAEs. Knows nothing of ranks."""
