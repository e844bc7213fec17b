"""flywheel's attention over arrays, for training and prefill."""
