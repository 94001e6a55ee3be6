"""Networks that several rewards share, and the loading of their weights."""
