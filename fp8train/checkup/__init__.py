"""What must not change: checks of a model and its configuration, one function each, for `fp8train doctor`."""
