"""The small UNet of a course, conditioned on a context vector."""
