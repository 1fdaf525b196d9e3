"""Makes several processes one run: DeepSpeed's engine and options, optimizers, launchers, signals."""
