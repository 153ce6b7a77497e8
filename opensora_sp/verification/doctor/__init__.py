"""The doctor: checks whether this machine can run the program, and prints a table."""
