"""What `fp8train bench` times, one subject a file, and the clock they share."""
