"""Device operations of ddpo_fast: torch (and later Triton) only, nothing else of the project is imported here."""
