"""What FP8 does to the operands of every linear: measured now and then, while a model trains."""
