"""The page to play in: its form, the runs behind it, and what it shows of them."""
