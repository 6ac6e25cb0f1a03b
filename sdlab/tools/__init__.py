"""The command line, and what an experiment will cost."""
