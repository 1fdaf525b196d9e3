"""One reward a file: what scores pictures."""
