"""stepfusion."""
