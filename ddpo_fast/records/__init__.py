"""What a run leaves behind: its directory, checkpoints, metrics, report, model card, exports."""
