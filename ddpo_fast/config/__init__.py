"""The options, with their defaults, and the rules that their values must meet."""
