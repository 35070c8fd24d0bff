"""How long a mechanism takes, and how much memory: every measurement in a process of its own."""
