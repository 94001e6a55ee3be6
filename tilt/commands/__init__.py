"""One module a command: its options and what it does; `tilt.main` finds them."""
