"""Calls rewards: in this process, in a separate one, or on a server. Also has the code that rewards share."""
