"""How a reward is called: in this process, in one of its own, or on a server; and what rewards share."""
