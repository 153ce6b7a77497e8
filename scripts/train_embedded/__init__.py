"""How the embedded model was made; see opensora_sp/assets/embedded/README.md."""

# Before torch: the program decides there how OpenMP's threads wait.
import opensora_sp  # noqa: F401
