"""Real images and the files of a base model."""
