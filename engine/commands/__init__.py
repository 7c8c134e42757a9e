"""The commands of the program ``stepfusion``."""
