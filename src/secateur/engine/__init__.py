"""The sweeps, the journal, resume: the only place that moves tensors between files, devices and methods."""
