"""Training of small models on folders of images."""
