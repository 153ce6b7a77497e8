"""Is this machine fit to run the program: one table of checks, each with what was found."""
