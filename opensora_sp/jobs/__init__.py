"""A whole run: open the models, make the outputs, write, record, resume."""
