"""Several processes as one run: DeepSpeed's engine and options, optimizers, launchers, signals."""
